"""Where the time of a step goes: data, forward, backward, optimizer, other; and how much of it is this rank's own."""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch

from fabriclite.layout import Layout

Phase = Literal["data", "forward", "backward", "optimizer", "other"]
PHASES: Final[tuple[Phase, ...]] = ("data", "forward", "backward", "optimizer", "other")

Part = Literal["start", "data", "forward", "loss", "backward", "optimizer", "other"]
"""What runs between two marks. ``"start"``: from the end of a step to the first thing the next one tells of, which is
where scripts read data by themselves. ``"loss"``: after a forward, and part of it if a backward follows."""


def phase_of(part: Part, next_part: Part) -> Phase:
    """Under which phase the time of ``part`` is counted."""
    if part == "loss":
        return "forward" if next_part == "backward" else "other"
    return "other" if part == "start" else part


def waiting(layout: Layout, buffers: bool) -> frozenset[Part]:
    """In which parts of a step a rank may wait for another.

    Args:
        layout: how the strategy spreads the model.
        buffers: the model has some, which replicas send each other before forward.
    """
    if layout.world == 1:
        return frozenset()
    late: frozenset[Part] = frozenset(("backward", "optimizer", "other", "loss"))
    return late | {"forward"} if layout.gathers or layout.tensor > 1 or buffers else late


@dataclass(slots=True)
class Times:
    """Seconds of one interval.

    Attributes:
        wall: by phase.
        own: in which this rank did not wait for others, as far as that is known.
        before: of ``own``, those before the first collective of a step, on the host.
    """

    wall: dict[str, float] = field(default_factory=lambda: {str(phase): 0.0 for phase in PHASES})
    own: float = 0.0
    before: float = 0.0


class HostClock:
    """Attributes the time of the thread that trains to phases.

    A rank waits for others inside collectives only. Own time is all time of the parts that hold none, and in those
    that ``waits`` names the processor time of this thread: who waits for a message takes none.
    """

    def __init__(self, waits: frozenset[Part]) -> None:
        self._waits = waits
        self._times = Times()
        self._part: Part = "start"
        self._wall = time.perf_counter()
        self._cpu = time.thread_time()

    def enter(self, part: Part) -> None:
        """What comes now is ``part``, and what the last call said is over."""
        wall, cpu = time.perf_counter(), time.thread_time()
        times, spent = self._times, wall - self._wall
        times.wall[phase_of(self._part, part)] += spent
        times.own += min(spent, cpu - self._cpu) if self._part in self._waits else spent
        if self._part in ("start", "data"):
            times.before += spent
        self._part, self._wall, self._cpu = part, wall, cpu

    def take(self) -> Times:
        """What was since the last take."""
        self.enter(self._part)
        times, self._times = self._times, Times()
        return times


class DeviceClock:
    """The same on CUDA, by the device's own clock. Nothing waits: marks are read once the device has passed them.

    What the device waits inside NCCL is not told apart from its work. Own time is therefore only that before the first
    collective of a step: data, on the host's clock, and forward where it holds no collective.
    """

    def __init__(self, waits: frozenset[Part], device: torch.device) -> None:
        self._forward_is_own = "forward" not in waits
        self._host = HostClock(waits)
        self._device = device
        self._marks: deque[tuple[Part, Any]] = deque()
        self._free: list[Any] = []
        self._mark("start")

    def enter(self, part: Part) -> None:
        self._host.enter(part)
        self._mark(part)

    def _mark(self, part: Part) -> None:
        event: Any = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append((part, event))

    def take(self) -> Times:
        """What was since the last take. Waits until the device has come to the last mark."""
        host, times = self._host.take(), Times()
        self._marks[-1][1].synchronize()
        while len(self._marks) > 1:
            part, begin = self._marks.popleft()
            after, end = self._marks[0]
            times.wall[phase_of(part, after)] += begin.elapsed_time(end) / 1000
            self._free.append(begin)
        # While the script waits for a batch the device is still busy or has nothing to do: that time is the host's.
        times.wall["data"] = host.wall["data"]
        times.before = host.before
        times.own = host.before + (times.wall["forward"] if self._forward_is_own else 0.0)
        return times


def clock_for(device: torch.device, waits: frozenset[Part]) -> HostClock | DeviceClock:
    """The clock that knows most about ``device``."""
    return DeviceClock(waits, device) if device.type == "cuda" else HostClock(waits)


def slowest(own: tuple[float, ...]) -> tuple[int, float] | None:
    """The rank that takes longest by itself, and how many times the median of all; ``None`` for one rank.

    Returns:
        ``(rank, ratio)`` with ``ratio`` 1.2 for 20 % longer.
    """
    if len(own) < 2:
        return None
    middle = sorted(own)[(len(own) - 1) // 2]
    rank = max(range(len(own)), key=own.__getitem__)
    return (rank, own[rank] / middle) if middle > 0 else None
