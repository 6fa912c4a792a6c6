"""Many points drawn as few: of each bucket of steps the least, the mean and the most are kept."""

from dataclasses import dataclass

import numpy as np

from fabriclite.watching.page.curves import Floats


@dataclass(frozen=True, slots=True)
class Buckets:
    """Points to draw, NaN where a line must break.

    Attributes:
        steps: middle of each bucket, float64 of shape ``(n,)``, as all others.
        low, mean, high: of the finite values in it.
        points: how many points the fullest bucket has; 1: every point is drawn.
    """

    steps: Floats
    low: Floats
    mean: Floats
    high: Floats
    points: int


def bucketed(steps: Floats, values: Floats, most: int) -> Buckets:
    """At most ``most`` buckets of equal width in steps.

    Args:
        steps: ascending, float64 of shape ``(n,)``.
        values: float64 of shape ``(n,)``; NaN and infinities stand apart: they make no mean, and break a line where a
            bucket has nothing else.
        most: number of buckets.
    """
    if len(steps) <= most:
        clean = np.where(np.isfinite(values), values, np.nan)
        return Buckets(steps, clean, clean, clean, 1)
    first, last = steps[0], steps[-1]
    place = np.minimum((steps - first) / max(last - first, 1e-300) * most, most - 1).astype(np.int64)
    begins = np.concatenate([[0], np.flatnonzero(np.diff(place)) + 1])
    finite = np.isfinite(values)
    count = np.add.reduceat(finite.astype(np.float64), begins)
    low = np.minimum.reduceat(np.where(finite, values, np.inf), begins)
    high = np.maximum.reduceat(np.where(finite, values, -np.inf), begins)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.add.reduceat(np.where(finite, values, 0.0), begins) / count
    low[count == 0] = high[count == 0] = np.nan
    ends = np.append(begins[1:], len(steps)) - 1
    middle = (steps[begins] + steps[ends]) / 2
    return Buckets(middle, low, mean, high, int((ends - begins).max()) + 1)


def alone(buckets: Buckets) -> Buckets:
    """Those with no neighbour to draw a line to."""
    known = np.isfinite(buckets.mean)
    before, after = np.append(False, known[:-1]), np.append(known[1:], False)
    here = known & ~before & ~after
    return Buckets(buckets.steps[here], buckets.low[here], buckets.mean[here], buckets.high[here], buckets.points)


def needs_log(values: Floats) -> bool:
    """Whether all are above 0 and most of them lie far apart: a factor of 30 between the 1st and 99th percentile."""
    if len(values) < 2 or values.min() <= 0:
        return False
    low, high = np.percentile(values, (1, 99))
    return bool(high / low > 30)
