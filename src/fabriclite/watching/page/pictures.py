"""The plots over steps: each takes values, and gives SVG."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from fabriclite.watching.page.buckets import Buckets, alone, bucketed, needs_log
from fabriclite.watching.page.curves import Curve, Floats
from fabriclite.watching.page.gather import Seen, Spread
from fabriclite.watching.page.ink import (
    COLOURS,
    HALF,
    WIDE,
    Picture,
    colour,
    drawn,
    label_ends,
    log_y,
    scale_y,
    steps_x,
)
from fabriclite.watching.page.marks import Mark, draw_marks
from fabriclite.watching.page.units import Unit, amount, counted, time_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_POINTS: Final = 400  # buckets of a line over half the page


def curve_picture(name: str, title: str, curve: Curve, unit: Unit, seen: Seen, marks: Sequence[Mark]) -> Picture:
    """One number over steps; on a logarithmic axis where it spans far."""
    log = needs_log(curve.finite)
    steps = bucketed(curve.steps, curve.values, _POINTS)

    def draw(axes: "Axes") -> None:
        for at, values in curve.again:
            draw_line(axes, at, values, COLOURS["faint"], 150)
        draw_line(axes, curve.steps, curve.values, colour(0), _POINTS)
        log_y(axes) if log else scale_y(axes, unit)
        _limits(axes, seen)
        draw_marks(axes, marks, "step")
        draw_bad(axes, curve.bad_steps)
        if len(curve.finite):
            end = float(curve.finite[-1])
            label_ends(axes, [(end, amount(end, unit), colour(0))])

    notes = [
        f"line: mean of up to {steps.points:,} logged steps, band: their least and most" if steps.points > 1 else "",
        f"NaN or infinite at {counted(len(curve.bad_steps), 'step', 'steps')}" if len(curve.bad_steps) else "",
    ]
    svg = drawn(name, title, _in_words(curve, unit), (HALF, 2.3), draw)
    return Picture(name, title, _in_words(curve, unit), svg, note="; ".join(note for note in notes if note))


def lines_picture(
    name: str, title: str, curves: Sequence[tuple[str, Curve]], unit: Unit, seen: Seen, marks: Sequence[Mark]
) -> Picture:
    """The same number of a few ranks: one colour each, and one band behind all of them."""
    lines = [bucketed(curve.steps, curve.values, 200) for _, curve in curves]
    merged = max((line.points for line in lines), default=1)

    def draw(axes: "Axes") -> None:
        ends = []
        for number, ((label, curve), line) in enumerate(zip(curves, lines, strict=True)):
            if merged > 1:
                axes.fill_between(line.steps, line.low, line.high, color=COLOURS["grid"], linewidth=0)
            draw_joined(axes, line, colour(number), dotted=len(curve.steps) <= 30)
            if len(curve.finite):
                ends.append((float(curve.finite[-1]), label, colour(number)))
        _from_zero(axes)
        scale_y(axes, unit)
        _limits(axes, seen)
        draw_marks(axes, marks, "step")
        label_ends(axes, ends)

    alt = "; ".join(f"{label}: {_in_words(curve, unit)}" for label, curve in curves)
    svg = drawn(name, title, alt, (HALF, 2.3), draw)
    note = f"lines: means of up to {merged:,} logged steps, band: the least and most of all ranks"
    return Picture(name, title, alt, svg, note=note if merged > 1 else "")


def spreads_picture(
    name: str, title: str, spreads: Sequence[tuple[str, Spread]], unit: Unit, seen: Seen, marks: Sequence[Mark]
) -> Picture:
    """Numbers of many ranks: a band from the least to the most, and the mean."""

    def draw(axes: "Axes") -> None:
        ends = []
        for number, (label, spread) in enumerate(spreads):
            low = bucketed(spread.low.steps, spread.low.values, _POINTS)
            high = bucketed(spread.high.steps, spread.high.values, _POINTS)
            mean = bucketed(spread.mean.steps, spread.mean.values, _POINTS)
            axes.fill_between(low.steps, low.low, high.high, color=colour(number), alpha=0.25, linewidth=0)
            draw_joined(axes, mean, colour(number), dotted=len(spread.mean.steps) <= 30)
            if len(spread.mean.finite):
                ends.append((float(spread.mean.finite[-1]), label, colour(number)))
        _from_zero(axes)
        scale_y(axes, unit)
        _limits(axes, seen)
        draw_marks(axes, marks, "step")
        label_ends(axes, ends)

    alt = "; ".join(
        f"{label}: least {_in_words(spread.low, unit)}, most {_in_words(spread.high, unit)}"
        for label, spread in spreads
    )
    svg = drawn(name, title, alt, (HALF, 2.3), draw)
    return Picture(name, title, alt, svg, note="line: mean of the ranks, band: the least and the most of them")


def progress_picture(seen: Seen, marks: Sequence[Mark]) -> Picture:
    """Steps done over time: how fast, when it stood still, what came again."""
    zero, longest = time_range(seen)
    by, word = time_axis(longest)

    def draw(axes: "Axes") -> None:
        for number in range(int(seen.course.stretch.max()) + 1 if len(seen.course.steps) else 0):
            here = np.flatnonzero(seen.course.stretch == number)
            here = here[:: max(1, len(here) // 500)]
            at, steps = (seen.course.times[here] - zero) / by, seen.course.steps[here]
            for part, ink in ((seen.course.counts[here], colour(0)), (~seen.course.counts[here], COLOURS["faint"])):
                axes.plot(at[part], steps[part], color=ink, marker="o" if part.sum() == 1 else "", markersize=3)
        axes.set_xlim(-0.01 * longest / by, max(longest / by * 1.01, 1e-3))
        axes.set_ylim(bottom=min(0.0, *seen.course.steps) if len(seen.course.steps) else 0.0)
        scale_y(axes, "")
        axes.set_ylabel("steps done")
        axes.set_xlabel(f"{word} since the first start")
        moved = [Mark(mark.kind, mark.step, (mark.time - zero) / by) for mark in marks]
        draw_marks(axes, moved, "time")

    alt = f"Steps done over {longest / by:.3g} {word}, with {counted(len(marks), 'event', 'events')}."
    title = "Steps over time"
    return Picture("plot-progress", title, alt, drawn("plot-progress", title, alt, (WIDE, 2.5), draw), wide=True)


def phases_picture(phases: Sequence[tuple[str, Curve, int]], seen: Seen, marks: Sequence[Mark]) -> Picture:
    """Seconds per step of rank 0, one phase on the other. ``phases`` are name, curve and number of colour."""
    steps = np.unique(np.concatenate([curve.steps for _, curve, _ in phases]))
    usual = float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0
    before = np.append(steps[0] - usual, steps)  # a logged step stands for those since the one before
    edges = np.linspace(before[0], before[-1], 251) if len(steps) > 250 else before
    heights = [_means_between(curve, edges) for _, curve, _ in phases]

    def draw(axes: "Axes") -> None:
        bottom = np.zeros(len(edges) - 1)
        for (_, _, number), height in zip(phases, heights, strict=True):
            axes.stairs(bottom + height, edges, baseline=bottom, fill=True, color=colour(number), linewidth=0)
            bottom = bottom + height
        axes.set_ylim(0, max(float(bottom.max(initial=0.0)) * 1.05, 1e-9))
        scale_y(axes, "seconds")
        _limits(axes, seen)
        draw_marks(axes, marks, "step")

    alt = "; ".join(f"{name}: mean {amount(mean_of(curve), 'seconds')}" for name, curve, _ in phases)
    svg = drawn("plot-phases", "Time of a step by phase", alt, (WIDE, 2.5), draw)
    key = tuple((f"c{number % 10}", name) for name, _, number in phases)
    return Picture("plot-phases", "Time of a step by phase", alt, svg, wide=True, key=key, note="of rank 0")


# -- parts of plots ---------------------------------------------------------------------------------------------------


def draw_line(axes: "Axes", steps: Floats, values: Floats, ink: str, most: int) -> None:
    """A line, with a band where each of its points stands for several, and dots where there is nothing to join."""
    if not len(steps):
        return
    points = bucketed(steps, values, most)
    if points.points > 1:
        axes.fill_between(points.steps, points.low, points.high, color=ink, alpha=0.22, linewidth=0)
    draw_joined(axes, points, ink, dotted=len(steps) <= 30)


def draw_joined(axes: "Axes", points: Buckets, ink: str, dotted: bool) -> None:
    """The line of the means alone."""
    axes.plot(points.steps, points.mean, color=ink, marker="o" if dotted else "", markersize=2.5)
    dots = alone(points)
    if len(dots.steps):
        axes.plot(dots.steps, dots.mean, "o", color=ink, markersize=3.5)


def draw_bad(axes: "Axes", steps: Floats) -> None:
    """Crosses at the upper edge where a number is NaN or infinite."""
    if len(steps):
        low, high = axes.get_xlim()
        places = np.unique(np.round((steps - low) / (high - low) * 300)) / 300 * (high - low) + low
        axes.plot(
            places, np.full(len(places), 0.97), "x", color=COLOURS["bad"], markersize=5, markeredgewidth=1.3, zorder=5,
            transform=axes.get_xaxis_transform(), gid="nonfinite",
        )  # fmt: skip


def mean_of(curve: Curve) -> float | None:
    """Of the finite values."""
    return float(curve.finite.mean()) if len(curve.finite) else None


def time_range(seen: Seen) -> tuple[float, float]:
    """The first moment that is known of a run, and how long after it the last one is."""
    times = [start.started for start in seen.starts] + [event.time for event in seen.events]
    known = np.concatenate([np.array(times, dtype=np.float64), seen.course.times])
    known = known[np.abs(known) < 1e15]
    return (float(known.min()), float(known.max() - known.min())) if len(known) else (0.0, 0.0)


def _limits(axes: "Axes", seen: Seen) -> None:
    steps_x(axes, *seen.step_range)


def _from_zero(axes: "Axes") -> None:
    """Begin the axis at 0, unless all lies within a small part below the top, where ranks could not be told apart."""
    low, high = axes.get_ylim()
    axes.set_ylim(low if low > 0.6 * high else min(0.0, low), max(high, 1e-9))


def _means_between(curve: Curve, edges: Floats) -> Floats:
    finite = np.isfinite(curve.values)
    behind = edges + 0.5  # an edge belongs to what is before it
    sums, _ = np.histogram(curve.steps[finite], behind, weights=curve.values[finite])
    counts, _ = np.histogram(curve.steps[finite], behind)
    return np.asarray(np.maximum(sums, 0.0) / np.maximum(counts, 1))


def _in_words(curve: Curve, unit: Unit) -> str:
    values = curve.finite
    if not len(values):
        return "no number"
    low, high, last = (amount(float(value), unit) for value in (values.min(), values.max(), values[-1]))
    return f"from {low} to {high}, {last} at step {curve.steps[np.isfinite(curve.values)][-1]:,.0f}"
