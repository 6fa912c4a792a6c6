"""Timing things against each other on a machine that is never quiet.

All contenders take one short block each, in an order that is shuffled every round, and a contender is only compared
with the baseline of its own round: what slows the machine for longer than a round slows both. The figure is the median
of those differences (and ratios) over many rounds.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

WARM_UP: Final = 3
"""Rounds that are not counted: lazy state of optimizers, DDP's second look at its buckets, compiled byte code."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Where the values of all rounds lie.

    Attributes:
        median: of the values.
        low, high: first and third quartile of the values: how noisy one round is.
        sure_low, sure_high: 95 % confidence interval of the median, whatever the distribution: how sure the median is.
    """

    median: float
    low: float
    high: float
    sure_low: float
    sure_high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        ordered = sorted(values)
        n = len(ordered)
        low, median, high = statistics.quantiles(ordered, n=4, method="inclusive") if n > 1 else [ordered[0]] * 3
        reach = 0.98 * n**0.5  # ranks of the binomial 95 % interval around n / 2
        sure_low, sure_high = ordered[max(0, int(n / 2 - reach))], ordered[min(n - 1, int(n / 2 + reach))]
        return cls(median, low, high, sure_low, sure_high)


@dataclass(frozen=True, slots=True)
class Row:
    """One contender of a case.

    Attributes:
        seconds: median over the rounds.
        over, ratio: seconds more than the first contender of the case, and times as many; ``None`` for that one itself.
    """

    case: str
    name: str
    seconds: float
    over: Spread | None
    ratio: Spread | None


def cpu() -> float:
    """CPU seconds that this process has used, all threads."""
    return time.process_time()


def elapsed() -> float:
    """Seconds that passed."""
    return time.perf_counter()


def measure(
    blocks: Mapping[str, Callable[[], object]],
    rounds: int,
    clocks: Sequence[Callable[[], float]],
    before: Callable[[], object] = lambda: None,
) -> list[dict[str, list[float]]]:
    """Seconds of every block in every round, by each of the clocks.

    Args:
        blocks: what to time, by name.
        rounds: how often.
        clocks: ``cpu`` leaves out what other processes take from this one; ``elapsed`` includes waiting.
        before: called before each block, outside of its time.
    """
    order = list(blocks)
    shuffler = random.Random(0)  # seeded: all ranks must shuffle alike
    times: list[dict[str, list[float]]] = [{name: [] for name in order} for _ in clocks]
    gc.collect()
    gc.freeze()  # collections stay on, as in training, but look only at what the contenders leave behind
    try:
        for turn in range(WARM_UP + rounds):
            shuffler.shuffle(order)
            for name in order:
                before()
                begins = [clock() for clock in clocks]
                blocks[name]()
                for clock, begin, by_name in zip(clocks, begins, times, strict=True):
                    if turn >= WARM_UP:
                        by_name[name].append(clock() - begin)
    finally:
        gc.unfreeze()
    return times


def compare(case: str, times: Mapping[str, Sequence[float]], steps: int = 1) -> list[Row]:
    """One row per contender, against the first one, round by round.

    Args:
        case: what was timed.
        times: seconds of each block, from :func:`measure`.
        steps: how many steps one block takes; rows are per step.
    """
    base_name, base = next(iter(times.items()))
    rows = []
    for name, own in times.items():
        over = ratio = None
        if name != base_name:
            over = Spread.of([(a - b) / steps for a, b in zip(own, base, strict=True)])
            ratio = Spread.of([a / b for a, b in zip(own, base, strict=True)])
        rows.append(Row(case, name, statistics.median(own) / steps, over, ratio))
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, in the unit that suits each case's first row."""
    lines = [
        "| case | contender | time | over the first (quartiles) | ratio to the first (95 % interval) |",
        "|---|---|---:|---:|---:|",
    ]
    scale, unit, case = 1.0, "s", None
    for row in rows:
        if row.case != case:
            case = row.case
            scale, unit = next(u for u in _UNITS if row.seconds * u[0] >= 1 or u is _UNITS[-1])
        over = ratio = ""
        if row.over is not None and row.ratio is not None:
            values = (scale * v for v in (row.over.median, row.over.low, row.over.high))
            over = "{:+.2f} {} ({:+.2f} to {:+.2f})".format(next(values), unit, *values)
            ratio = f"{row.ratio.median:.4f} ({row.ratio.sure_low:.4f} to {row.ratio.sure_high:.4f})"
        lines.append(f"| {row.case} | {row.name} | {scale * row.seconds:.2f} {unit} | {over} | {ratio} |")
    return "\n".join(lines)


_UNITS: Final = ((1.0, "s"), (1e3, "ms"), (1e6, "us"))
