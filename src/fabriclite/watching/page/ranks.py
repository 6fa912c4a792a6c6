"""What differs between ranks, summed up while it is read: a thousand ranks times a million steps fit nowhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fabriclite.watching.page.curves import TOO_LARGE

MOST_COLUMNS: Final = 300  # of a heat map
MOST_ROWS: Final = 256
_MOST_CELLS: Final = 4 * MOST_COLUMNS
_BLOCK: Final = 64  # steps that are summed up at a time

Grid = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class HeatMap:
    """A number by rank and step.

    Attributes:
        values: float64 of shape ``(rows, columns)``, NaN where nothing was logged.
        first, last: the steps at its left and right edge.
        steps_per_column: at least 1.
        ranks: how many there are.
        ranks_per_row: 1, or so many of which each row shows the largest.
    """

    values: Grid
    first: float
    last: float
    steps_per_column: float
    ranks: int
    ranks_per_row: int


class RankGrid:
    """Sums a number by rank over stretches of steps, which get twice as wide each time there are too many."""

    def __init__(self) -> None:
        self._width = 1
        self._sums: dict[int, Grid] = {}
        self._counts: dict[int, Grid] = {}
        self._last = -1

    def add(self, step: int, values: Sequence[float]) -> None:
        """Take the values of all ranks at a step. Where steps go back, what was there counts no longer."""
        if step < self._last:
            for key in [key for key in self._sums if key * self._width >= step]:
                del self._sums[key], self._counts[key]
        self._last = step
        new = np.array(values, dtype=np.float64)
        known = _usable(new)
        self._put(step // self._width, np.where(known, new, 0.0), known.astype(np.float64))
        while len(self._sums) > _MOST_CELLS:
            self._halve()

    def heat_map(self) -> HeatMap | None:
        """The means, in at most ``MOST_COLUMNS`` columns and ``MOST_ROWS`` rows; ``None``: nothing was added."""
        if not self._sums:
            return None
        keys = np.array(sorted(self._sums))
        ranks = max(len(sums) for sums in self._sums.values())
        spacing = float(np.median(np.diff(keys))) if len(keys) > 1 else 1.0
        spacing = max(spacing, (keys[-1] - keys[0] + 1) / MOST_COLUMNS)
        places = ((keys - keys[0]) / spacing + 1e-9).astype(np.int64)
        sums, counts = np.zeros((2, ranks, places[-1] + 1))
        for key, place in zip(keys.tolist(), places, strict=True):
            size = len(self._sums[key])
            sums[:size, place] += self._sums[key]
            counts[:size, place] += self._counts[key]
        with np.errstate(invalid="ignore", divide="ignore"):
            means = sums / counts  # NaN where there is nothing
        per_row = -(-ranks // MOST_ROWS)
        first = float(keys[0] * self._width)
        width = spacing * self._width
        return HeatMap(_rows(means, per_row), first, first + width * sums.shape[1], width, ranks, per_row)

    def _put(self, key: int, sums: Grid, counts: Grid) -> None:
        if key in self._sums:
            sums, counts = _padded_sum(self._sums[key], sums), _padded_sum(self._counts[key], counts)
        self._sums[key], self._counts[key] = sums, counts

    def _halve(self) -> None:
        sums, counts = self._sums, self._counts
        self._width, self._sums, self._counts = self._width * 2, {}, {}
        for key in sums:
            self._put(key // 2, sums[key], counts[key])


def _padded_sum(one: Grid, other: Grid) -> Grid:
    if len(one) < len(other):
        one, other = other, one
    total = one.copy()
    total[: len(other)] += other
    return total


def _rows(values: Grid, per_row: int) -> Grid:
    if per_row == 1:
        return values
    missing = -len(values) % per_row
    padded = np.concatenate([values, np.full((missing, values.shape[1]), np.nan)])
    return np.asarray(np.fmax.reduce(padded.reshape(-1, per_row, values.shape[1]), axis=1))


@dataclass(frozen=True, slots=True)
class RankTime:
    """How long the steps of one rank took, of all that it computed, those that were computed again too.

    Attributes:
        rank: which.
        seconds: mean of a step.
        own: mean of that without waiting for others; ``None``: not known.
        slowest: in which part of the logged steps it took the longest: by its own seconds where they are known.
        peak: bytes at most; ``None``: not known.
    """

    rank: int
    seconds: float | None
    own: float | None
    slowest: float
    peak: float | None


class RankTimes:
    """Sums for :class:`RankTime`, of many steps at a time."""

    def __init__(self) -> None:
        none = np.zeros(0)
        self._seconds, self._own, self._slowest, self._peak = (none, none), (none, none), none, none
        self._steps = 0
        self._waiting: list[tuple[Sequence[float], Sequence[float], Sequence[float]]] = []
        self._sizes = (0, 0, 0)

    def add(self, seconds: Sequence[float], own: Sequence[float], peak: Sequence[float]) -> None:
        """Take one step's values by rank."""
        sizes = (len(seconds), len(own), len(peak))
        if sizes != self._sizes or len(self._waiting) == _BLOCK:
            self._sum_up()
            self._sizes = sizes
        self._waiting.append((seconds, own, peak))

    def _sum_up(self) -> None:
        if not self._waiting:
            return
        took, alone, most = (np.array(part, dtype=np.float64) for part in zip(*self._waiting, strict=True))
        self._waiting = []
        self._seconds, self._own = _counted(self._seconds, took), _counted(self._own, alone)
        judged = alone if _usable(alone).any() else took
        judged = judged[_usable(judged).any(axis=1)]
        if len(judged):
            self._steps += len(judged)
            slowest = np.argmax(np.where(_usable(judged), judged, -np.inf), axis=1)
            self._slowest = _padded_sum(
                self._slowest, np.bincount(slowest, minlength=judged.shape[1]).astype(np.float64)
            )
        if most.shape[1]:
            highest = np.fmax.reduce(np.where(_usable(most), most, np.nan), axis=0)
            size = max(len(highest), len(self._peak))
            self._peak = np.fmax(_padded(self._peak, size), _padded(highest, size))

    def table(self) -> tuple[RankTime, ...]:
        """By rank."""
        self._sum_up()
        size = max(len(self._seconds[0]), len(self._own[0]), len(self._peak))
        seconds, own = _means(self._seconds, size), _means(self._own, size)
        slowest = _padded(self._slowest, size)
        peak = _padded(self._peak, size)
        share = np.nan_to_num(slowest) / max(1, self._steps)
        return tuple(
            RankTime(rank, _known(seconds[rank]), _known(own[rank]), float(share[rank]), _known(peak[rank]))
            for rank in range(size)
        )


def _usable(values: Grid) -> NDArray[np.bool_]:
    return np.abs(values) < TOO_LARGE  # not NaN either


def _counted(sums: tuple[Grid, Grid], new: Grid) -> tuple[Grid, Grid]:
    known = _usable(new)
    return _padded_sum(sums[0], np.where(known, new, 0.0).sum(axis=0)), _padded_sum(sums[1], known.sum(axis=0) * 1.0)


def _means(sums: tuple[Grid, Grid], size: int) -> Grid:
    with np.errstate(invalid="ignore", divide="ignore"):
        return _padded(sums[0] / sums[1], size)


def _padded(values: Grid, size: int) -> Grid:
    return np.concatenate([values, np.full(size - len(values), np.nan)])


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
