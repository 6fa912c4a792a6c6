"""Figures of a run in few letters, for a line or a bar. Pure."""

import math
from collections.abc import Mapping

from fabriclite.watching.options import RESERVED
from fabriclite.watching.phases import slowest
from fabriclite.watching.records import StepRecord

_SLOW = 1.15
"""From which ratio to the median a rank is named,"""
_PART = 0.1
"""and which part of a step the others must wait for it."""


def number(value: float) -> str:
    """Three decimals where that says something, else three digits."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.3f}" if 0.1 <= abs(value) < 10_000 or value == 0 else f"{value:.3g}"


def size(count: int) -> str:
    """Bytes, with the unit that suits."""
    for unit, digits in (("TB", 12), ("GB", 9), ("MB", 6)):
        if count >= 10**digits:
            return f"{count / 10**digits:.1f} {unit}"
    return f"{count / 1000:.0f} kB"


def duration(seconds: float) -> str:
    """``"1:05"``, ``"2:03:04"``, ``"3d 04:05"``, or ``"-"`` where it is not known."""
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def pace(metrics: Mapping[str, float]) -> str:
    """The rate that says most: tokens, else samples, else steps."""
    for name in ("tokens", "samples", "steps"):
        value = metrics.get(f"{name}_per_second")
        if value is not None:
            return f"{value:,.0f} {name}/s" if value >= 100 else f"{value:.3g} {name}/s"
    return ""


def given(record: StepRecord) -> dict[str, float]:
    """The metrics that the script gave."""
    return {name: value for name, value in record.metrics.items() if name not in RESERVED}


def summary(record: StepRecord, remaining: float) -> list[str]:
    """What is said of a logged step, most important first."""
    parts = [f"{name} {number(value)}" for name, value in given(record).items()]
    parts.append(pace(record.metrics))
    if "mfu" in record.metrics:
        parts.append(f"MFU {record.metrics['mfu']:.1%}")
    if record.peak:
        parts.append(f"mem {size(max(record.peak))}")
    if math.isfinite(remaining):
        parts.append(f"eta {duration(remaining)}")
    parts.append(straggler(record))
    return [part for part in parts if part]


def straggler(record: StepRecord) -> str:
    """The rank that the others wait for, if they do so for a good part of the step."""
    slow = slowest(record.own)
    if slow is None or slow[1] < _SLOW:
        return ""
    rank, ratio = slow
    waited = record.own[rank] * (1 - 1 / ratio)
    return f"slowest rank {rank} (+{ratio - 1:.0%})" if waited >= _PART * max(record.seconds) else ""


def line(record: StepRecord, total: int | None, remaining: float) -> str:
    """A logged step in one line."""
    width = max(4, len(str(total or 0)))
    of = f"/{total}" if total is not None else ""
    return "  ".join([f"step {record.step:{width}d}{of}", *summary(record, remaining)])


def fitting(parts: list[str], room: int) -> str:
    """As many of ``parts``, from the first, as fit into ``room`` letters."""
    while parts and len("  ".join(parts)) > room:
        parts = parts[:-1]
    return "  ".join(parts)
