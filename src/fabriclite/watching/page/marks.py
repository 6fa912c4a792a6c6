"""Where events stand on the axes of the plots."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from fabriclite.watching.page.curves import Course
from fabriclite.watching.page.ink import COLOURS
from fabriclite.watching.records import Event, EventKind

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PLACES: Final = 500  # of an axis that can be told apart


@dataclass(frozen=True, slots=True)
class Look:
    """How one kind of event is drawn.

    Attributes:
        marker: as matplotlib names it.
        colour: name of the page's colour.
        line: whether a line crosses the plot there.
        sign: the same mark as a character, for the key.
        word: for the key.
    """

    marker: str
    colour: str
    line: bool
    sign: str
    word: str


LOOKS: Final[dict[EventKind, Look]] = {
    "start": Look(">", "c0", True, "▶", "start"),
    "load": Look("v", "c4", False, "▼", "load"),
    "save": Look("o", "c2", False, "●", "save"),
    "profile": Look("s", "c7", False, "■", "profile"),
    "spike": Look("^", "c1", False, "▲", "spike"),
    "nonfinite": Look("X", "bad", False, "✖", "NaN or infinite"),
    "preempted": Look("D", "c1", True, "◆", "preempted"),
    "failure": Look("X", "bad", True, "✖", "failure"),
    "end": Look("|", "muted", True, "│", "end"),
    "note": Look(".", "muted", False, "·", "note"),
}


@dataclass(frozen=True, slots=True)
class Mark:
    """An event with its place on both axes.

    Attributes:
        kind: of event.
        step: the one it names, or that of the step logged before it.
        time: when.
    """

    kind: EventKind
    step: float
    time: float


def marks(events: Sequence[Event], course: Course) -> tuple[Mark, ...]:
    """Where all events stand. One that no step was logged before stands at the first."""
    if not len(course.steps):
        return tuple(Mark(event.kind, float(event.step or 0), event.time) for event in events)
    found = []
    times = np.maximum.accumulate(np.nan_to_num(course.times))
    for event in events:
        before = max(0, int(np.searchsorted(times, event.time, side="right")) - 1)
        step = course.steps[before] if event.step is None else event.step
        found.append(Mark(event.kind, float(step), event.time))
    return tuple(found)


def draw_marks(axes: "Axes", found: Sequence[Mark], by: str, height: float = 0.0) -> None:
    """Draw them at the lower edge of the axes; lines where a run began or ended.

    Args:
        axes: with its limits set.
        found: what to draw.
        by: ``"step"`` or ``"time"``: which place is meant.
        height: of the marks, from 0 (lower edge) to 1.
    """
    low, high = axes.get_xlim()
    for kind, look in LOOKS.items():
        at = [getattr(mark, by) for mark in found if mark.kind == kind]
        places = {round((place - low) / (high - low) * _PLACES) for place in at if low <= place <= high}
        shown = sorted(low + place / _PLACES * (high - low) for place in places)
        ink = COLOURS[look.colour]
        if look.line:
            for place in shown[:60]:
                axes.axvline(place, color=ink, linewidth=0.8, linestyle=(0, (3, 3)), alpha=0.7, zorder=1.5)
        if shown:
            axes.plot(
                shown, [height] * len(shown), look.marker, color=ink, markersize=4.5, markeredgewidth=0.6, zorder=4,
                markeredgecolor=COLOURS["paper"] if look.marker not in "|." else ink,
                transform=axes.get_xaxis_transform(), clip_on=False, gid=f"events-{kind}",
            )  # fmt: skip


def key_of(events: Sequence[Event]) -> tuple[tuple[str, str, str], ...]:
    """(colour, sign, word) of the kinds that happened."""
    kinds = {event.kind for event in events}
    return tuple((look.colour, look.sign, look.word) for kind, look in LOOKS.items() if kind in kinds)
