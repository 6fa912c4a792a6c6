"""The page itself: from a run's folder to one HTML file."""

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fabriclite.errors import ConfigError
from fabriclite.watching import rundir
from fabriclite.watching.page import facts
from fabriclite.watching.page.curves import Curve
from fabriclite.watching.page.facts import Table
from fabriclite.watching.page.gather import FEW_RANKS, THROUGHPUT, Seen, gather
from fabriclite.watching.page.heat import heat_picture
from fabriclite.watching.page.ink import Picture, clean, require_matplotlib
from fabriclite.watching.page.marks import Mark, key_of, marks
from fabriclite.watching.page.pictures import (
    curve_picture,
    lines_picture,
    phases_picture,
    progress_picture,
    spreads_picture,
    time_range,
)
from fabriclite.watching.page.planned import plan_picture, plan_rows, planned
from fabriclite.watching.page.units import Unit, counted, moment

MOST_METRICS: Final = 36  # that are drawn
_TORN_SHOWN: Final = 20
_PHASES: Final = ("data", "forward", "backward", "optimizer", "other")
_THROUGHPUT: Final[dict[str, tuple[str, Unit]]] = {
    "samples_per_second": ("Samples per second", "per second"),
    "tokens_per_second": ("Tokens per second", "per second"),
    "flops_per_second": ("FLOP/s of all ranks", "flops"),
    "mfu": ("Model FLOP utilisation", "fraction"),
    "steps_per_second": ("Steps per second", "per second"),
}


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page under a heading of its own."""

    name: str
    title: str
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()
    note: str = ""
    text: str = ""
    folds: tuple[tuple[str, str], ...] = ()
    marked: bool = False

    @property
    def empty(self) -> bool:
        return not (self.pictures or self.tables or self.note or self.text)


def write(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run, whole or not at all.

    Args:
        folder: the run's.
        out: the file; ``None``: ``report.html`` in the folder.

    Returns:
        The file.

    Raises:
        ConfigError: there is no run, ``out`` is a folder, or matplotlib is not installed.
        OSError: it cannot be written.
    """
    path = Path(folder) / "report.html" if out is None else Path(out)
    if path.is_dir():
        raise ConfigError(f"`--out` must be a file to write, but {str(path)!r} is a folder. Give a file's name.")
    text = page(folder, time.time())
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
    return path


def page(folder: str | Path, now: float) -> str:
    """The page of a run, also of one that is going on.

    Args:
        folder: the run's.
        now: seconds since 1970.

    Raises:
        ConfigError: there is no run, or matplotlib is not installed.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    require_matplotlib()
    run = rundir.read_without_steps(folder)
    torn: list[str] = []
    seen = gather(run.starts, rundir.steps_of(folder, torn), run.events)
    word, why = facts.state(seen, now)
    name = clean((run.starts[-1].name if run.starts else "") or Path(folder).resolve().name)
    parts = [part for part in sections(seen, (*run.torn, *torn)) if not part.empty]
    room = PackageLoader("fabriclite.watching.page", "")
    made = Environment(
        loader=room,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return made.get_template("page.html.jinja").render(
        name=name,
        state=word,
        state_class=word.split()[0],
        why=why,
        made=moment(now),
        folder=clean(str(Path(folder).resolve())),
        head=facts.head(seen, name, now),
        cards=facts.cards(seen),
        sections=parts,
        key=key_of(run.events),
        repeats=not bool(seen.course.counts.all()),
        logged=counted(len(seen.course.steps), "step", "steps"),
        style=made.get_template("page.css").render(),
    )


def sections(seen: Seen, torn: Sequence[str]) -> list[Section]:
    """All parts of the page, those with nothing in them too."""
    found = marks(seen.events, seen.course)
    zero, _ = time_range(seen)
    progress = (progress_picture(seen, found),) if len(seen.course.steps) else ()
    starts = (facts.starts_table(seen),) if seen.starts else ()
    empty = "" if progress else "No step was logged yet."
    events = (facts.events_table(seen.events, zero),) if seen.events else ()
    return [
        Section("progress", "Progress", progress, starts, empty, marked=True),
        _metrics(seen, found),
        _throughput(seen, found),
        _memory(seen, found),
        _phases(seen, found),
        _ranks(seen, found),
        Section("events", "Events", (), events, folds=facts.long_texts(seen.events)),
        Section("setup", "Set-up", text=clean(seen.starts[-1].report).strip("\n") if seen.starts else ""),
        Section("torn", "Lines that could not be read", note=_torn(torn)),
    ]


def _metrics(seen: Seen, found: Sequence[Mark]) -> Section:
    names = sorted((n for n in seen.metrics if n not in THROUGHPUT), key=lambda name: ("loss" not in name, name))
    used: set[str] = set()
    pictures = []
    for name in names[:MOST_METRICS]:
        label = _identifier(name, used)
        pictures.append(curve_picture(f"plot-{label}", clean(name), seen.metrics[name], "", seen, found))
    note = ""
    if len(names) > MOST_METRICS:
        rest = ", ".join(clean(name) for name in names[MOST_METRICS : 2 * MOST_METRICS])
        note = f"{MOST_METRICS} of {len(names):,} metrics are drawn; not drawn: {rest}"
        note += ", and more." if len(names) > 2 * MOST_METRICS else "."
    return Section("metrics", "Metrics", tuple(pictures), note=note)


def _identifier(name: str, used: set[str]) -> str:
    """A word for an ``id`` that no other has."""
    word = "metric-" + (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "nameless")[:40]
    best, number = word, 2
    while best in used:
        best, number = f"{word}-{number}", number + 1
    used.add(best)
    return best


def _throughput(seen: Seen, found: Sequence[Mark]) -> Section:
    pictures = [
        curve_picture(f"plot-{name.replace('_', '-')}", title, seen.metrics[name], unit, seen, found)
        for name, (title, unit) in _THROUGHPUT.items()
        if name in seen.metrics
    ]
    return Section("throughput", "Throughput", tuple(pictures))


def _memory(seen: Seen, found: Sequence[Mark]) -> Section:
    pictures = [
        _by_rank(name, title, "bytes", seen, found)
        for name, title in (("memory", "Memory held"), ("peak", "Peak of memory since the start"))
        if name in seen.spreads
    ]
    tables = []
    plan = planned(seen.starts[-1].plan) if seen.starts else None
    note = ""
    if plan is not None:
        pictures.append(plan_picture(plan, seen))
        heads = ("phase", "module", "what", "bytes")
        tables.append(Table("The plan of one rank beside the measurement", heads, tuple(plan_rows(plan, seen)), (3,)))
        note = " ".join(plan.notes)
    return Section("memory", "Memory", tuple(pictures), tuple(tables), note)


def _phases(seen: Seen, found: Sequence[Mark]) -> Section:
    names = [name for name in _PHASES if name in seen.phases]
    names += sorted(name for name in seen.phases if name not in _PHASES)
    colours = [0, 1, 2, 3, 7, 4, 5, 6, 8, 9]  # `other` is grey
    curves = [(clean(name), seen.phases[name], number) for number, name in zip(colours, names, strict=False)]
    curves = [(name, curve, number) for name, curve, number in curves if len(curve.steps)]
    if not curves:
        return Section("phases", "Time")
    table = facts.phases_table([(name, curve) for name, curve, _ in curves])
    return Section("phases", "Time", (phases_picture(curves, seen, found),), (table,))


def _ranks(seen: Seen, found: Sequence[Mark]) -> Section:
    pictures = []
    for name, title in (("seconds", "Time of a step by rank"), ("own", "Own time of a step by rank")):
        if seen.world > FEW_RANKS and name in seen.maps:
            pictures.append(heat_picture(f"plot-{name}", title, seen.maps[name], seen))
        elif name in seen.lines:
            pictures.append(_by_rank(name, title, "seconds", seen, found))
    tables = (facts.ranks_table(seen),) if seen.ranks and seen.world > 1 else ()
    return Section("ranks", "Ranks", tuple(pictures), tables)


def _by_rank(name: str, title: str, unit: Unit, seen: Seen, found: Sequence[Mark]) -> Picture:
    if name not in seen.lines:
        return spreads_picture(f"plot-{name}", title, [("mean", seen.spreads[name])], unit, seen, found)
    curves: list[tuple[str, Curve]] = [(f"rank {rank}", curve) for rank, curve in enumerate(seen.lines[name])]
    return lines_picture(f"plot-{name}", title, curves, unit, seen, found)


def _torn(torn: Sequence[str]) -> str:
    if not torn:
        return ""
    named = ", ".join(clean(line) for line in torn[:_TORN_SHOWN])
    more = f" and {len(torn) - _TORN_SHOWN:,} more" if len(torn) > _TORN_SHOWN else ""
    return (
        f"{counted(len(torn), 'line', 'lines')} could not be read and {'is' if len(torn) == 1 else 'are'} not shown"
        f" here, as of a process that was killed while it wrote: {named}{more}."
    )
