"""A plan as a picture: the peak of each phase by kind, and memory over one step. Needs matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from fabriclite.errors import ConfigError
from fabriclite.planning.plan import Plan
from fabriclite.planning.values import PHASES, Kind, Moment

_GIB: Final = 2**30
# Okabe and Ito's palette, which people who are colour-blind can tell apart.
_COLOURS: Final[Mapping[Kind, str]] = {
    "parameters": "#0072B2",
    "optimizer": "#009E73",
    "buffers": "#999999",
    "input": "#F0E442",
    "gradients": "#E69F00",
    "activations": "#CC79A7",
    "communication": "#56B4E9",
    "temporary": "#D55E00",
}
"""The steadiest at the bottom."""
_PAPER: Final = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1}
"""Behind words that a line may cross."""


def draw(plan: Plan, path: str | Path) -> None:
    """Write the picture.

    Args:
        plan: what to draw.
        path: ends in ``.png`` or ``.svg``.

    Raises:
        ConfigError: matplotlib is missing, or the name ends otherwise.
    """
    target = Path(path)
    if target.suffix not in (".png", ".svg"):
        raise ConfigError(f"`picture` must end in .png or .svg, but is {str(path)!r}.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f"`picture` must find matplotlib, but: {error}. Run: pip install fabriclite[plots]"
        ) from error
    figure = Figure(figsize=(11, 5), layout="constrained")
    timeline = plan.estimate.timeline
    bars, areas = figure.subplots(1, 2, width_ratios=(1, 1.35), sharey=True)
    unit, scale = ("GiB", _GIB) if plan.peak >= _GIB / 10 else ("MiB", 2**20)
    kinds = _kinds(plan)
    _draw_bars(bars, plan, kinds, scale)
    _draw_step(areas, timeline, kinds, scale)
    bars.set_ylabel(f"{unit} of one rank")
    _draw_limit([bars, areas], plan, scale, unit)
    handles, names = bars.get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], loc="outside right center", frameon=False)
    figure.suptitle(_wrapped(plan.title), fontsize=10)
    figure.savefig(target, dpi=110)


def _kinds(plan: Plan) -> list[Kind]:
    """Those that can be seen at some moment, the steadiest first."""
    moments = [*plan.estimate.peaks.values(), *plan.estimate.timeline]
    seen = plan.peak / 500
    return [kind for kind in _COLOURS if any(moment.memory.by_kind.get(kind, 0) > seen for moment in moments)]


def _draw_bars(axes: Any, plan: Plan, kinds: Sequence[Kind], scale: int) -> None:
    peaks = plan.estimate.peaks
    phases = [phase for phase in PHASES if phase in peaks]
    bottom = [0.0] * len(phases)
    for kind in kinds:
        heights = [peaks[phase].memory.by_kind.get(kind, 0) / scale for phase in phases]
        axes.bar(phases, heights, bottom=bottom, color=_COLOURS[kind], label=kind, width=0.7)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    for place, (phase, top) in enumerate(zip(phases, bottom, strict=True)):
        highest = peaks[phase].memory.total == plan.peak
        axes.annotate(
            f"peak {top:.1f}" if highest else f"{top:.1f}",
            (place, top),
            (0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontweight="bold" if highest else "normal",
            fontsize=9,
            bbox=_PAPER,
        )
    axes.set_title("At most in each phase", fontsize=10)
    _tidy(axes)


def _draw_step(axes: Any, timeline: Sequence[Moment], kinds: Sequence[Kind], scale: int) -> None:
    places = range(len(timeline))
    layers = [[moment.memory.by_kind.get(kind, 0) / scale for moment in timeline] for kind in kinds]
    axes.stackplot(places, *layers, colors=[_COLOURS[kind] for kind in kinds], linewidth=0)
    axes.set_title("Over one step", fontsize=10)
    axes.set_xticks([])
    axes.margins(x=0)
    _tidy(axes)
    if not timeline:
        return
    for phase in PHASES:
        of_phase = [place for place, moment in enumerate(timeline) if moment.phase == phase]
        if of_phase:
            middle = (of_phase[0] + of_phase[-1]) / 2
            axes.annotate(phase, (middle, 0), (0, -6), textcoords="offset points", ha="center", va="top", fontsize=9)
            if of_phase[0]:
                axes.axvline(of_phase[0], color="#444444", linewidth=0.8, linestyle=":")
    highest = max(places, key=lambda place: timeline[place].memory.total)
    top = timeline[highest].memory.total / scale
    axes.plot([highest], [top], marker="v", color="black", markersize=6)
    axes.annotate(
        f"{top:.1f} in {timeline[highest].module or 'the root'}",
        (highest, top),
        (0, 6),
        textcoords="offset points",
        ha="left" if highest < len(timeline) / 2 else "right",
        va="bottom",
        fontsize=9,
        fontweight="bold",
        bbox=_PAPER,
    )


def _draw_limit(panels: Sequence[Any], plan: Plan, scale: int, unit: str) -> None:
    """A line where memory ends, if that is near what is held."""
    memory = plan.hardware.memory
    highest = plan.peak / scale
    if memory is not None and memory / scale <= 3 * highest:
        highest = max(highest, memory / scale)
        for axes in panels:
            axes.axhline(memory / scale, color="black", linewidth=1.2, linestyle="--")
        panels[0].annotate(
            f"memory {memory / scale:.1f} {unit}",
            (0, memory / scale),
            xycoords=("axes fraction", "data"),
            xytext=(4, 3),
            textcoords="offset points",
            fontsize=9,
        )
    panels[0].set_ylim(0, highest * 1.12)


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _wrapped(title: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(title, 130))
