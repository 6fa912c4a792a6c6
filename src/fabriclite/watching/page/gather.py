"""All that the page needs of a run's records, gathered in one pass over them."""

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from fabriclite.watching.page.curves import Columns, Course, Curve, course
from fabriclite.watching.page.ranks import HeatMap, RankGrid, RankTime, RankTimes
from fabriclite.watching.records import Event, RunFacts, StepRecord

FEW_RANKS: Final = 8  # so many are drawn as lines
THROUGHPUT: Final = ("samples_per_second", "tokens_per_second", "flops_per_second", "mfu", "steps_per_second")
BY_RANK: Final = ("seconds", "own", "memory", "peak")


@dataclass(frozen=True, slots=True)
class Spread:
    """A number that each rank has: the least, the mean and the most of all ranks."""

    low: Curve
    mean: Curve
    high: Curve


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a run's records tell.

    Attributes:
        starts: one for each time it was started.
        events: of all ranks, by time.
        course: which steps were logged when.
        metrics: what the script gave, and throughput.
        phases: seconds per step of rank 0 by phase.
        spreads: of ``seconds``, ``own``, ``memory``, ``peak`` over the ranks, those that are there.
        lines: the same by rank, where there are at most ``FEW_RANKS``.
        maps: of ``seconds`` and ``own`` by rank and step.
        ranks: how each rank did.
        world: number of ranks that steps were logged of.
    """

    starts: tuple[RunFacts, ...]
    events: tuple[Event, ...]
    course: Course
    metrics: Mapping[str, Curve]
    phases: Mapping[str, Curve]
    spreads: Mapping[str, Spread]
    lines: Mapping[str, tuple[Curve, ...]]
    maps: Mapping[str, HeatMap]
    ranks: tuple[RankTime, ...]
    world: int

    @property
    def step_range(self) -> tuple[float, float]:
        """The first and last step that any axis has to show; steps must have been logged."""
        logged = self.course.steps
        first = min([float(logged.min()), *(float(start.first_step) for start in self.starts)])
        return first, float(logged.max())


def gather(starts: Sequence[RunFacts], steps: Iterable[StepRecord], events: Sequence[Event]) -> Seen:
    """Read all steps, once.

    Args:
        starts: of the run.
        steps: in the order of writing.
        events: of the run.
    """
    sums = _Sums()
    for record in steps:
        sums.add(record)
    when = course(sums.steps, sums.times, starts)
    maps = {name: grid.heat_map() for name, grid in sums.grids.items()}
    return Seen(
        starts=tuple(starts),
        events=tuple(events),
        course=when,
        metrics={name: column.curve(when) for name, column in sums.metrics.items()},
        phases={name: column.curve(when) for name, column in sums.phases.items()},
        spreads=sums.spreads(when),
        lines=sums.lines(when),
        maps={name: found for name, found in maps.items() if found is not None},
        ranks=sums.times_by_rank.table(),
        world=sums.world,
    )


class _Sums:
    """What grows while steps are read."""

    def __init__(self) -> None:
        self.steps, self.times = array("q"), array("d")
        self.metrics, self.phases, self._spreads, self._lines = Columns(), Columns(), Columns(), Columns()
        self.grids = {"seconds": RankGrid(), "own": RankGrid()}
        self.times_by_rank = RankTimes()
        self.world = 0

    def add(self, record: StepRecord) -> None:
        row = len(self.steps)
        self.steps.append(record.step)
        self.times.append(record.time)
        for name, value in record.metrics.items():
            self.metrics[name].add(row, value)
        for name, value in record.phases.items():
            self.phases[name].add(row, value)
        for name in BY_RANK:
            values: tuple[float, ...] = getattr(record, name)
            if values:
                self._add_by_rank(row, name, values)
                if name in self.grids and len(values) > 1:
                    self.grids[name].add(record.step, values)
        self.times_by_rank.add(record.seconds, record.own, record.peak)

    def _add_by_rank(self, row: int, name: str, values: tuple[float, ...]) -> None:
        self.world = max(self.world, len(values))
        for rank, value in enumerate(values if len(values) <= FEW_RANKS else ()):
            self._lines[name, rank].add(row, value)
        if not math.isfinite(sum(values)):
            values = tuple(value for value in values if math.isfinite(value)) or (math.nan,)
        self._spreads[name, "low"].add(row, min(values))
        self._spreads[name, "mean"].add(row, sum(values) / len(values))
        self._spreads[name, "high"].add(row, max(values))

    def spreads(self, when: Course) -> dict[str, Spread]:
        found = {}
        for name in BY_RANK:
            if (name, "low") in self._spreads:
                low, mean, high = (self._spreads[name, part].curve(when) for part in ("low", "mean", "high"))
                found[name] = Spread(low, mean, high)
        return found

    def lines(self, when: Course) -> dict[str, tuple[Curve, ...]]:
        if self.world > FEW_RANKS:
            return {}
        found: dict[str, tuple[Curve, ...]] = {}
        for name in BY_RANK:
            columns = [self._lines[name, rank] for rank in range(self.world) if (name, rank) in self._lines]
            if columns:
                found[name] = tuple(column.curve(when) for column in columns)
        return found
