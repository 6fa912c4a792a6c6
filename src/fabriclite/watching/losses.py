"""The losses of a step, agreed on by all ranks before its optimizer steps; and what to do when they are wrong."""

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from fabriclite import _torch, collectives, shards
from fabriclite.spelling import class_name
from fabriclite.watching import repeating
from fabriclite.watching.repeating import Finding
from fabriclite.world import World

_FAR: Final = 2.0
"""How many times larger or smaller than usual the output of a module is when it is named for a spike."""
_SAMPLES: Final = 8
"""How many sampled steps make what is usual."""
_EVERY: Final = 100
_FIRST: Final = 10
"""Which steps are sampled: the 10th, and each 100th after it."""


@dataclass(frozen=True, slots=True)
class Agreed:
    """What all ranks know of a step's losses.

    Attributes:
        finite: all losses on all ranks are.
        mean: of those that are; NaN where there is none.
        here: the first on this rank that is not finite; ``None``: there is none.
    """

    finite: bool
    mean: float
    here: float | None


@dataclass(frozen=True, slots=True)
class Call:
    """A forward of a module that was set up, kept by reference."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class Losses:
    """Notes losses and the forwards they came from, from one check to the next.

    On the CPU a loss is read at once, and the forward of the first one that is not finite is the one kept. On a device
    it travels to the host beside the work, and the last forward is kept: keeping all those of a step that accumulates
    would hold their inputs in device memory.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._values: list[Tensor] = []
        self._events: list[Any] = []
        self._calls: dict[int, Call] = {}
        self._frozen = False

    def keep(self, call: Call) -> None:
        """This forward comes next."""
        if not self._frozen:
            self._calls[id(call.module)] = call

    def note(self, loss: Tensor) -> None:
        """``loss`` is differentiated next. Nothing waits for the device."""
        value = shards.local(loss.detach())
        value = value.reshape(()) if value.numel() == 1 else value.float().mean()
        if value.device.type == "cuda":
            host = torch.empty((), dtype=value.dtype, pin_memory=True)
            value = host.copy_(value, non_blocking=True)
            event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._events.append(event)
        elif value.device.type == "cpu":
            self._frozen = self._frozen or not math.isfinite(value.item())
        self._values.append(value)

    def agree(self) -> Agreed:
        """Tell the others of the losses since the last call, and hear of theirs. Every rank must call this.

        On CUDA it waits for the last forward, while the backward goes on.
        """
        for event in self._events:
            event.synchronize()
        values = [float(value) for value in self._values]
        good = [value for value in values if math.isfinite(value)]
        bad, total, count = collectives.sum_on_host(self._world, (len(values) - len(good), sum(good), len(good)))
        self._values, self._events = [], []
        here = next((value for value in values if not math.isfinite(value)), None)
        return Agreed(finite=bad == 0, mean=total / count if count else math.nan, here=here)

    @property
    def calls(self) -> list[Call]:
        """The forwards to look into, in the order in which their modules were first called."""
        return list(self._calls.values())

    def forget(self) -> None:
        """The step is done: let go of its inputs."""
        self._calls = {}
        self._frozen = False


class Looking:
    """Finds out, on all ranks together, which module is behind a loss.

    Args:
        world: the processes.
        forward: gives how the strategy calls a module.
        settle: brings a module back to what an optimizer steps, after a forward that no backward follows.
    """

    def __init__(
        self,
        world: World,
        forward: Callable[[nn.Module], Callable[..., Any]],
        settle: Callable[[nn.Module], None],
    ) -> None:
        self._world = world
        self._forward = forward
        self._settle = settle

    def find(self, calls: list[Call], bad: float | None) -> list[tuple[float | None, Finding]]:
        """What each rank finds, in rank order, with its own ``bad`` loss. Every rank must call this."""
        if not self._same_everywhere(calls):
            why = "no forward of a module was told of, or not the same ones on all ranks"
            return collectives.gather_objects(self._world, (bad, Finding("unknown", why=why)))
        mine = [repeating.find(call.module, self._forward(call.module), call.args, call.kwargs) for call in calls]
        for call in calls:
            self._settle(call.module)
        own = next((finding for finding in mine if finding.kind != "loss"), mine[-1])
        return collectives.gather_objects(self._world, (bad, own))

    def far(self, calls: list[Call], usual: "Usual") -> str:
        """In words, the first module whose output is far from ``usual`` on any rank. Every rank must call this."""
        if not self._same_everywhere(calls):
            return ""
        found: tuple[str, float] | None = None
        for call in calls:
            now = repeating.magnitudes(call.module, self._forward(call.module), call.args, call.kwargs)
            self._settle(call.module)
            found = found or usual.first_far(now)
        everyone = collectives.gather_objects(self._world, found)
        named = [(rank, *what) for rank, what in enumerate(everyone) if what is not None]
        if not named:
            return "no module's output was far from usual"
        rank, name, ratio = named[0]
        return f"the output of {name or 'the root'} on rank {rank} was {ratio:.3g} times its usual size"

    def _same_everywhere(self, calls: list[Call]) -> bool:
        names = [class_name(call.module) for call in calls]
        everyone = collectives.gather_objects(self._world, names)
        return bool(names) and all(other == names for other in everyone)


class Usual:
    """How large the outputs of a model's modules usually are, from sampled steps."""

    def __init__(self) -> None:
        self._samples: deque[dict[str, Tensor]] = deque(maxlen=_SAMPLES)
        self._hooks: list[Any] = []

    def begin(self, module: nn.Module, step: int) -> None:
        """A forward of ``module`` begins: sample it if it is that step's turn. Costs a pass over the activations."""
        if step % _EVERY != _FIRST or self._hooks or _torch.is_compiled(module):
            return
        seen: dict[str, Tensor] = {}
        for name, sub in module.named_modules():
            hook: Any = lambda sub, args, output, name=name: repeating.note_magnitude(seen, name, output)  # noqa: E731
            self._hooks.append(sub.register_forward_hook(hook))
        self._samples.append(seen)

    def end(self) -> None:
        """The forward is over."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def first_far(self, now: Mapping[str, float]) -> tuple[str, float] | None:
        """The first of ``now``, in order, that is far from the samples' median, and how many times that it is."""
        samples = [{name: float(value) for name, value in sample.items()} for sample in self._samples]
        for name, value in now.items():
            before = sorted(sample[name] for sample in samples if name in sample)
            middle = before[len(before) // 2] if before else 0.0
            if middle > 0 and not 1 / _FAR <= value / middle <= _FAR:
                return name, value / middle
        return None
