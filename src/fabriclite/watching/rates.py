"""From what the ranks measured over an interval to figures of the whole run. Pure."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from fabriclite.watching.records import StepRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one rank measured since the step logged before.

    Attributes:
        steps: how many there were.
        seconds, own: that they took, and in which it did not wait for others.
        memory, peak: bytes.
        samples, tokens: it worked through; 0: not told.
        flops: of the whole model for this rank's part of the data, in all these steps; 0: not known.
        metrics: of the last step.
        phases: seconds by phase.
    """

    steps: int
    seconds: float
    own: float
    memory: int
    peak: int
    samples: float = 0.0
    tokens: float = 0.0
    flops: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    phases: Mapping[str, float] = field(default_factory=dict)


def record(ranks: Sequence[Measured], step: int, time: float, replicas: int, peak_flops: float | None) -> StepRecord:
    """One line of a run's folder.

    Args:
        ranks: what each measured, in rank order.
        step: steps done.
        time: now.
        replicas: groups of ranks that read different data. Ranks of one group (tensor parallel) told of the same.
        peak_flops: what one device can do per second; ``None``: not known.
    """
    steps = max(1, ranks[0].steps)
    metrics = {**means([one.metrics for one in ranks]), **_rates(ranks, replicas, peak_flops)}
    return StepRecord(
        step=step,
        time=time,
        metrics=metrics,
        phases={phase: seconds / steps for phase, seconds in ranks[0].phases.items()},
        seconds=tuple(one.seconds / steps for one in ranks),
        own=tuple(one.own / steps for one in ranks),
        memory=tuple(one.memory for one in ranks),
        peak=tuple(one.peak for one in ranks),
    )


def means(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over the ranks that gave it, in the order in which they came first."""
    names = dict.fromkeys(name for one in metrics for name in one)
    return {name: fmean(one[name] for one in metrics if name in one) for name in names}


def _rates(ranks: Sequence[Measured], replicas: int, peak_flops: float | None) -> dict[str, float]:
    seconds = max(one.seconds for one in ranks)
    if seconds <= 0:
        return {}
    share = replicas / len(ranks)  # ranks that share one replica all told of the same data
    rates = {"steps_per_second": ranks[0].steps / seconds}
    for name in ("samples", "tokens", "flops"):
        total = sum(getattr(one, name) for one in ranks) * share
        if total > 0:
            rates[f"{name}_per_second"] = total / seconds
    if peak_flops and "flops_per_second" in rates:
        rates["mfu"] = rates["flops_per_second"] / (peak_flops * len(ranks))
    return rates


class Remaining:
    """How long the rest of a run takes, from its last steps."""

    def __init__(self, total: int | None, done: int, now: float) -> None:
        self._total = total
        self._marks: deque[tuple[float, int]] = deque([(now, done)], maxlen=20)

    def mark(self, done: int, now: float) -> None:
        """``done`` steps are done at ``now``."""
        if len(self._marks) == 2 and self._marks[0][1] < self._marks[1][1]:
            self._marks.popleft()  # the first steps warm up: once there are others they count no more
        self._marks.append((now, done))

    def seconds(self) -> float:
        """Infinite as long as nothing is known of the pace, or of the end."""
        (begin, first), (now, done) = self._marks[0], self._marks[-1]
        if self._total is None or done == first:
            return math.inf
        return max(0, self._total - done) * (now - begin) / (done - first)
