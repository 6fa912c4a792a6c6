"""Numbers over steps. Where a run went back to a checkpoint steps come again: the later ones count."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fabriclite.watching.records import RunFacts

Floats = NDArray[np.float64]

TOO_LARGE: Final = 1e60  # taken for infinite: no axis could show it together with anything else


@dataclass(frozen=True, slots=True)
class Curve:
    """One number over steps.

    Attributes:
        steps: those that count, ascending, float64 of shape ``(n,)``.
        values: float64 of shape ``(n,)``, with NaN and infinities.
        again: (steps, values) of each stretch that was computed anew later.
    """

    steps: Floats
    values: Floats
    again: tuple[tuple[Floats, Floats], ...] = ()

    @property
    def finite(self) -> Floats:
        """The values that count and are numbers."""
        return self.values[np.isfinite(self.values)]

    @property
    def bad_steps(self) -> Floats:
        """Where it is NaN or infinite."""
        return self.steps[~np.isfinite(self.values)]

    @property
    def last(self) -> float | None:
        """The value at the last step, NaN and infinities too; ``None``: there is none."""
        return float(self.values[-1]) if len(self.values) else None


@dataclass(frozen=True, slots=True)
class Course:
    """Which steps were logged when.

    Attributes:
        steps, times: in the order of writing, float64 of shape ``(n,)``.
        stretch: number of the stretch each belongs to, ascending, int64 of shape ``(n,)``: a new one begins with each
            start, and where steps go back.
        counts: whether no later stretch computed the step anew, bool of shape ``(n,)``.
    """

    steps: Floats
    times: Floats
    stretch: NDArray[np.int64]
    counts: NDArray[np.bool_]


def course(steps: Sequence[int], times: Sequence[float], starts: Sequence[RunFacts]) -> Course:
    """Which steps count.

    Args:
        steps: in the order of writing.
        times: when, seconds.
        starts: of the run.
    """
    at, when = np.array(steps, dtype=np.float64), np.array(times, dtype=np.float64)
    if not len(at):
        return Course(at, when, np.zeros(0, np.int64), np.zeros(0, np.bool_))
    known = sorted((start.started, start.first_step) for start in starts)
    attempt = np.searchsorted(np.array([started for started, _ in known]), when, side="right")
    new = np.flatnonzero((np.diff(at) < 0) | (np.diff(attempt) > 0)) + 1
    begins = np.concatenate([[0], new]).astype(np.int64)
    lowest = at[begins]
    for index in range(1, len(begins)):
        here, before = attempt[begins[index]], attempt[begins[index] - 1]
        if here > before:  # all after its first step is computed anew, also what is not logged again
            lowest[index] = min(lowest[index], known[here - 1][1] + 1)
    later = np.append(np.minimum.accumulate(lowest[::-1])[::-1][1:], np.inf)
    stretch = np.zeros(len(at), np.int64)
    stretch[new] = 1
    stretch = np.cumsum(stretch)
    return Course(at, when, stretch, at < later[stretch])


class Column:
    """One number of the steps that have it, as they are read."""

    __slots__ = ("_rows", "_values")

    def __init__(self) -> None:
        self._rows, self._values = array("q"), array("d")

    def add(self, row: int, value: float) -> None:
        self._rows.append(row)
        self._values.append(value)

    def curve(self, course: Course) -> Curve:
        """It, over steps."""
        rows = np.array(self._rows, dtype=np.int64)
        values = np.array(self._values, dtype=np.float64)
        values[np.abs(values) > TOO_LARGE] = np.inf
        counts = course.counts[rows]
        lost = rows[~counts]
        parts = np.split(np.arange(len(lost)), np.flatnonzero(np.diff(course.stretch[lost])) + 1)
        again = tuple((course.steps[lost[part]], values[~counts][part]) for part in parts if len(part))
        return Curve(course.steps[rows[counts]], values[counts], again)


class Columns(dict[Any, Column]):
    """Columns by name, made when they are first named."""

    def __missing__(self, name: Any) -> Column:
        self[name] = column = Column()
        return column
