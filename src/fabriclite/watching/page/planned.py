"""What was planned beside what was measured."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from fabriclite.planning.values import KINDS, PHASES
from fabriclite.watching.page.gather import Seen
from fabriclite.watching.page.ink import COLOURS, WIDE, Picture, clean, colour, drawn
from fabriclite.watching.page.units import amount, percent, scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PROCESS: Final = "of the whole process: Python, libraries and all"
_KIND_COLOURS: Final = {kind: number for number, kind in enumerate(KINDS)}


@dataclass(frozen=True, slots=True)
class Planned:
    """The predicted peaks of one rank.

    Attributes:
        phases: (phase, module, bytes by kind), in the order of a run.
        notes: of the plan.
    """

    phases: tuple[tuple[str, str, dict[str, float]], ...]
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> float:
        """The most at any moment, bytes."""
        return max(sum(kinds.values()) for _, _, kinds in self.phases)


def planned(plan: Mapping[str, Any] | None) -> Planned | None:
    """What ``Estimate.to_json()`` says of peaks; ``None``: nothing that could be read."""
    peaks = plan.get("peaks") if plan else None
    if plan is None or not isinstance(peaks, Mapping):
        return None
    phases = []
    for phase in PHASES:
        moment = peaks.get(phase)
        if not isinstance(moment, Mapping):
            continue
        kinds = _kinds(moment)
        if kinds:
            phases.append((str(phase), clean(str(moment.get("module", ""))), kinds))
    notes = plan.get("notes", ())
    texts = tuple(clean(str(note)) for note in notes) if isinstance(notes, list | tuple) else ()
    return Planned(tuple(phases), texts) if phases else None


def _kinds(moment: Mapping[str, Any]) -> dict[str, float]:
    memory = moment.get("memory")
    by_kind = memory.get("by_kind") if isinstance(memory, Mapping) else None
    if not isinstance(by_kind, Mapping):
        return {}
    found = {kind: by_kind.get(kind) for kind in KINDS}
    return {kind: float(size) for kind, size in found.items() if isinstance(size, int | float) and 0 < size < 1e18}


def measured_peak(seen: Seen) -> tuple[float, int] | None:
    """The most of all ranks, in bytes, and whose it is."""
    known = [(rank.peak, rank.rank) for rank in seen.ranks if rank.peak is not None]
    return max(known, key=lambda one: one[0], default=None)


def comparable(seen: Seen) -> bool:
    """Whether what was measured is what a plan counts. On a CPU it is the memory of the whole process, in which the
    interpreter and its libraries take hundreds of MiB."""
    return not any(start.device == "cpu" for start in seen.starts)


def plan_rows(plan: Planned, seen: Seen) -> list[tuple[str, ...]]:
    """Phase, module, largest kinds, bytes; then the whole, what was measured, and how far they are apart."""
    rows: list[tuple[str, ...]] = []
    for phase, module, kinds in plan.phases:
        parts = sorted(kinds.items(), key=lambda one: -one[1])
        largest = ", ".join(f"{kind} {amount(size, 'bytes')}" for kind, size in parts[:4])
        rows.append((phase, module or "whole model", largest, amount(sum(kinds.values()), "bytes")))
    rows.append(("peak, planned", "", "", amount(plan.peak, "bytes")))
    measured = measured_peak(seen)
    if measured is not None:
        size, rank = measured
        apart = f"{percent(size / plan.peak - 1)} of the plan" if comparable(seen) else _PROCESS
        rows.append((f"peak, measured on rank {rank}", "", apart, amount(size, "bytes")))
    return rows


def plan_picture(plan: Planned, seen: Seen) -> Picture:
    """Stacked bars of the planned peaks by phase; a line at the measured one."""
    measured = measured_peak(seen) if comparable(seen) else None
    kinds = [kind for kind in KINDS if any(kind in found for _, _, found in plan.phases)]

    def draw(axes: "Axes") -> None:
        names = [f"{phase}  {amount(sum(found.values()), 'bytes')}" for phase, _, found in plan.phases][::-1]
        left = [0.0] * len(names)
        for kind in kinds:
            widths = [found.get(kind, 0.0) for _, _, found in plan.phases][::-1]
            axes.barh(names, widths, 0.62, left, color=colour(_KIND_COLOURS[kind]), linewidth=0)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        longest = max(plan.peak, measured[0] if measured else 0.0)
        axes.set_xlim(0, longest * 1.06)
        if measured is not None:
            axes.axvline(measured[0], color=COLOURS["bad"], linewidth=1.4)
            text = f"measured {amount(measured[0], 'bytes')}"
            place = (measured[0], 1.02)
            axes.annotate(text, place, xycoords=("data", "axes fraction"), ha="right", color=COLOURS["bad"], fontsize=8)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", labelcolor=COLOURS["ink"], length=0)
        _bytes_x(axes, longest)

    alt = "; ".join(f"{phase} {amount(sum(found.values()), 'bytes')}" for phase, _, found in plan.phases)
    alt += f"; measured {amount(measured[0], 'bytes')}" if measured else ""
    title = "Planned peak by phase, and the measured one" if measured else "Planned peak by phase"
    svg = drawn("plot-plan", title, alt, (WIDE, 0.85 + 0.32 * len(plan.phases)), draw)
    key = tuple((f"c{_KIND_COLOURS[kind]}", str(kind)) for kind in kinds)
    return Picture("plot-plan", title, alt, svg, wide=True, key=key, note="of one rank")


def _bytes_x(axes: "Axes", longest: float) -> None:
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    by, name = scale(longest, "bytes")
    rough = longest / by / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(round_one * power for round_one in (1, 2, 5, 10) if round_one * power >= rough)
    axes.xaxis.set_major_locator(MultipleLocator(step * by))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / by:g}"))
    axes.set_xlabel(name)
