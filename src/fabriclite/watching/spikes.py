"""Whether a loss is far above those before it. Pure."""

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Final

WINDOW: Final = 64
"""How many losses back are compared with."""
LEAST: Final = 16
"""With fewer losses nothing is said: a run's first steps fall too fast to compare."""
_TIMES: Final = 8.0
"""How many standard deviations (of a normal distribution with that median deviation) are far. At 8 even losses with
heavy tails, such as those of small batches, are told apart from a batch that hurts."""
_SHARE: Final = 0.1
"""And at least this share of the median: losses that hardly vary otherwise jump at every small step."""
_TO_DEVIATION: Final = 1.4826
"""From the median absolute deviation to the standard deviation of a normal distribution."""


@dataclass(frozen=True, slots=True)
class Spike:
    """A loss that is far above those before it.

    Attributes:
        value: the loss.
        median: of those before.
        limit: from where on a loss counts as far.
    """

    value: float
    median: float
    limit: float


def limit_of(before: list[float] | tuple[float, ...]) -> float:
    """From where on a loss after ``before`` counts as a spike; infinite where there are too few to say."""
    if len(before) < LEAST:
        return math.inf
    median = statistics.median(before)
    deviation = _TO_DEVIATION * statistics.median(abs(value - median) for value in before)
    return median + max(_TIMES * deviation, _SHARE * abs(median))


class Spikes:
    """Judges one loss after the other. Ranks that are given the same losses say the same."""

    def __init__(self) -> None:
        self._before: deque[float] = deque(maxlen=WINDOW)
        self._above = False

    def judge(self, value: float) -> Spike | None:
        """Whether ``value`` is far above the last ones. Of several in a row only the first is told.

        Losses that are not finite are another's business: they are passed over.
        """
        if not math.isfinite(value):
            return None
        limit = limit_of(tuple(self._before))
        median = statistics.median(self._before) if self._before else value
        was_above, self._above = self._above, value > limit
        self._before.append(value)
        return Spike(value, median, limit) if self._above and not was_above else None
