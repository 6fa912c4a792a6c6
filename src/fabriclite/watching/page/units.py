"""Numbers as people read them."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final, Literal

Unit = Literal["", "bytes", "seconds", "per second", "flops", "fraction"]

_SCALES: Final[dict[Unit, tuple[tuple[float, str], ...]]] = {
    "": ((1.0, ""),),
    "bytes": ((1.0, "B"), (2.0**10, "KiB"), (2.0**20, "MiB"), (2.0**30, "GiB"), (2.0**40, "TiB")),
    "seconds": ((1e-6, "µs"), (1e-3, "ms"), (1.0, "s")),
    "per second": ((1.0, "/s"), (1e3, "k/s"), (1e6, "M/s"), (1e9, "G/s")),
    "flops": (
        (1.0, "FLOP/s"),
        (1e6, "MFLOP/s"),
        (1e9, "GFLOP/s"),
        (1e12, "TFLOP/s"),
        (1e15, "PFLOP/s"),
        (1e18, "EFLOP/s"),
    ),
    "fraction": ((0.01, "%"),),
}


def scale(largest: float, unit: Unit) -> tuple[float, str]:
    """What to divide by, and the name of the unit then, for numbers up to ``largest``."""
    scales = _SCALES[unit]
    fitting = [one for one in scales if abs(largest) >= one[0]]
    return fitting[-1] if fitting else scales[0]


def amount(value: float | None, unit: Unit = "") -> str:
    """A number with three or four digits and its unit."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "-∞"}.get(value, "NaN")
    by, name = scale(value, unit)
    number = value / by
    text = f"{number:,.0f}" if 1000 <= abs(number) < 1e7 else f"{number:.4g}" if not unit else f"{number:.3g}"
    return f"{text}{'' if name[:1] in ('/', '') else ' '}{name}"


def duration(seconds: float) -> str:
    """Such as ``2 h 13 min``."""
    if not 0 <= seconds < 1e12:
        return "-"
    if seconds < 60:
        return amount(seconds, "seconds") if seconds else "0 s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    first = next(index for index, (count, _) in enumerate(parts) if count)
    return " ".join(f"{count} {name}" for count, name in parts[first : first + 2] if count)


def moment(time: float) -> str:
    """When, in UTC."""
    try:
        return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return "-"


def percent(change: float) -> str:
    """With its sign."""
    return f"{change * 100:+.1f} %"


def counted(count: int, one: str, more: str) -> str:
    return f"{count:,} {one if count == 1 else more}"


def time_axis(longest: float) -> tuple[float, str]:
    """What to divide seconds by on an axis up to ``longest``, and what that is called."""
    steps: Sequence[tuple[float, str]] = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"))
    return next(((by, name) for by, name in steps if longest >= 3 * by), (1.0, "seconds"))
