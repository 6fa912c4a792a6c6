"""The head of the page and its tables, in words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fabriclite.watching.page.gather import Seen
from fabriclite.watching.page.ink import clean
from fabriclite.watching.page.marks import LOOKS
from fabriclite.watching.page.pictures import mean_of, time_range
from fabriclite.watching.page.planned import measured_peak
from fabriclite.watching.page.units import amount, counted, duration, moment
from fabriclite.watching.records import Event

State = Literal["finished", "failed", "preempted", "running", "ended without a word"]

MOST_EVENTS = 400  # rows of the table
MOST_RANKS = 32
MOST_TEXTS = 32

_ENDS: dict[str, State] = {"failure": "failed", "preempted": "preempted", "end": "finished"}
_QUIET = 120.0  # seconds without a line after which a run is not taken to be going on, at least


@dataclass(frozen=True, slots=True)
class Table:
    """A table of the page.

    Attributes:
        caption: what it is.
        head: names of columns.
        rows: cells, as text.
        numbers: indices of columns that are aligned as numbers.
        note: a line below.
    """

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: tuple[int, ...] = ()
    note: str = ""


def state(seen: Seen, now: float) -> tuple[State, str]:
    """How the last start ended, and a line on it.

    Args:
        seen: the run.
        now: seconds since 1970: a run that was heard of lately is taken to be going on.
    """
    begun = max((start.started for start in seen.starts if not math.isnan(start.started)), default=-math.inf)
    told = _end_of([event for event in seen.events if event.time >= begun])
    if told is not None:
        return _ENDS[told.kind], clean(told.text)
    first, longest = time_range(seen)
    quiet = now - (first + longest)
    usual = float(np.median(np.diff(seen.course.times))) if len(seen.course.times) > 1 else 0.0
    if 0 <= quiet < max(_QUIET, 5 * usual) and (seen.starts or seen.events or len(seen.course.times)):
        return "running", f"last heard of {duration(quiet)} before this page was made"
    return "ended without a word", "no event tells its end: the process was killed, or the machine went away"


def _end_of(events: Sequence[Event]) -> Event | None:
    """The event that tells how one start ended: the first failure, else that it was preempted, else its end."""
    for kind in _ENDS:  # another rank of a run that fails may still tell its end
        told = [event for event in events if event.kind == kind]
        if told:
            return told[0] if kind == "failure" else told[-1]
    return None


def head(seen: Seen, name: str, now: float) -> list[tuple[str, str]]:
    """(what, value) of the run."""
    if not seen.starts:
        return [("starts", "none could be read")]
    last = seen.starts[-1]
    first, longest = time_range(seen)
    done = int(seen.course.steps[seen.course.counts].max(initial=0)) if len(seen.course.steps) else 0
    steps = f"{done:,} of {last.total_steps:,}" if last.total_steps else f"{done:,}"
    found = [
        ("name", last.name or name),
        ("strategy", last.strategy),
        ("precision", last.precision),
        ("processes", f"{last.world_size:,} on {counted(last.nodes, 'machine', 'machines')}"),
        ("device", last.device),
        ("parameters", "" if last.parameters is None else f"{last.parameters:,} ({short(last.parameters)})"),
        ("versions", ", ".join(f"{name} {text}" for name, text in last.versions.items())),
        ("steps done", steps),
        ("first start", moment(first)),
        ("length", f"{duration(longest)}, {counted(len(seen.starts), 'start', 'starts')}"),
    ]
    return [(what, clean(text)) for what, text in found if text]


def short(count: int) -> str:
    """Such as ``7.24 B``."""
    for by, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= by:
            return f"{count / by:.3g} {letter}"
    return str(count)


def cards(seen: Seen) -> list[tuple[str, str, str]]:
    """(what, value, a word on it) of the few numbers that are looked for first."""
    found = []
    for name in ("loss", "train_loss", "train/loss"):
        curve = seen.metrics.get(name)
        if curve is not None and curve.last is not None:
            found.append((name, amount(curve.last), f"at step {curve.steps[-1]:,.0f}"))
            break
    for name, unit, what in (
        ("tokens_per_second", "per second", "tokens"),
        ("samples_per_second", "per second", "samples"),
        ("flops_per_second", "flops", "FLOP/s"),
        ("mfu", "fraction", "MFU"),
    ):
        curve = seen.metrics.get(name)
        if curve is not None and len(curve.finite):
            found.append((what, amount(float(np.median(curve.finite)), unit), "median"))  # type: ignore[arg-type]
    took = seen.spreads.get("seconds")
    if took is not None and len(took.high.finite):
        found.append(("a step", amount(float(np.median(took.high.finite)), "seconds"), "median, slowest rank"))
    peak = measured_peak(seen)
    if peak is not None:
        found.append(("peak memory", amount(peak[0], "bytes"), f"on rank {peak[1]}"))
    return found


def starts_table(seen: Seen) -> Table:
    """Each time the run was started."""
    rows = []
    for number, start in enumerate(seen.starts):
        last = number == len(seen.starts) - 1
        until = math.inf if last else seen.starts[number + 1].started
        here = (seen.course.times >= start.started) & (seen.course.times < until)
        logged = seen.course.steps[here]
        steps = f"{logged[0]:,.0f} to {logged[-1]:,.0f}" if len(logged) else "none"
        where = f"{start.world_size:,}, {start.device}".rstrip(", ")
        told = _end_of([event for event in seen.events if start.started <= event.time < until])
        unknown = "" if last else "without a word"  # of the last one the top of the page says what is known
        ended = unknown if told is None else str(_ENDS[told.kind])
        rows.append((str(start.attempt), moment(start.started), f"{start.first_step:,}", steps, ended, where))
    head = ("start", "when", "steps done before", "steps logged", "ended", "processes, device")
    return Table("Starts", head, tuple(tuple(clean(cell) for cell in row) for row in rows), (0, 2))


def phases_table(phases: Sequence[tuple[str, Any]]) -> Table:
    """Mean time by phase, and its part of the whole."""
    means = [(name, mean_of(curve) or 0.0) for name, curve in phases]
    total = sum(mean for _, mean in means) or 1.0
    rows = [(clean(name), amount(mean, "seconds"), f"{mean / total * 100:.1f} %") for name, mean in means]
    return Table("Mean time of a step by phase", ("phase", "time", "part"), tuple(rows), (1, 2))


def ranks_table(seen: Seen) -> Table:
    """The slowest ranks first."""
    order = sorted(seen.ranks, key=lambda one: (-one.slowest, -(one.own or one.seconds or 0.0)))
    rows = tuple(
        (
            str(one.rank),
            amount(one.seconds, "seconds"),
            amount(one.own, "seconds"),
            f"{one.slowest * 100:.1f} %",
            amount(one.peak, "bytes"),
        )
        for one in order[:MOST_RANKS]
    )
    note = (
        "Own time is that without waiting for other ranks; a rank is the slowest by its own time where that is known."
    )
    if len(order) > MOST_RANKS:
        note += f" The first {MOST_RANKS} of {len(order):,} ranks are shown."
    heads = ("rank", "mean step", "mean own time", "slowest in", "peak memory")
    return Table("Ranks, the slowest first", heads, rows, (0, 1, 2, 3, 4), note)


def events_table(events: Sequence[Event], zero: float) -> Table:
    """What happened. Of very many, saves, notes and profiles are left out first, then those in the middle."""
    shown = list(events)
    if len(shown) > MOST_EVENTS:
        weighty = [event for event in shown if event.kind not in ("save", "note", "profile")]
        kept = weighty if len(weighty) <= MOST_EVENTS else weighty[: MOST_EVENTS // 2] + weighty[-MOST_EVENTS // 2 :]
        shown = kept or shown[: MOST_EVENTS // 2] + shown[-MOST_EVENTS // 2 :]
    rows = tuple(
        (
            f"{LOOKS[event.kind].sign} {event.kind}",
            duration(event.time - zero),
            moment(event.time),
            "" if event.step is None else f"{event.step:,}",
            str(event.rank),
            clean(event.text) + _details(event),
        )
        for event in shown
    )
    note = f"{len(shown):,} of {len(events):,} events are shown." if len(shown) < len(events) else ""
    return Table("Events", ("event", "after", "when", "step", "rank", "what"), rows, (3, 4), note)


def long_texts(events: Sequence[Event]) -> tuple[tuple[str, str], ...]:
    """(what it belongs to, text) of details that have several lines, such as tracebacks."""
    found = []
    for event in events:
        for key, value in event.details.items():
            if isinstance(value, str) and "\n" in value:
                title = f"{event.kind} on rank {event.rank}, {moment(event.time)}: {key}"
                found.append((clean(title), clean(value).strip("\n")))
    return tuple(found[:MOST_TEXTS])


def _details(event: Event) -> str:
    """What the event's line does not say yet. What has several lines is shown below."""
    told = {key: value for key, value in event.details.items() if isinstance(value, str | int | float)}
    texts = [
        f"{key}: {value}" for key, value in told.items() if "\n" not in str(value) and str(value) not in event.text
    ]
    text = clean(", ".join(texts))
    return f" ({text[:300]}{'…' if len(text) > 300 else ''})" if text else ""
