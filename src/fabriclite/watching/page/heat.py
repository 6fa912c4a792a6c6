"""Ranks over steps as a map of colours."""

from typing import TYPE_CHECKING, Final

import numpy as np

from fabriclite.watching.page.gather import Seen
from fabriclite.watching.page.ink import WIDE, Picture, drawn, steps_x
from fabriclite.watching.page.ranks import HeatMap
from fabriclite.watching.page.units import amount, scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ABOVE: Final = "#ff3b30"


def heat_picture(name: str, title: str, found: HeatMap, seen: Seen) -> Picture:
    """Seconds by rank and step. The colours reach from the 1st to the 99th percentile; what is above stands out."""
    known = found.values[np.isfinite(found.values)]
    low, high = np.percentile(known, (1, 99)) if len(known) else (0.0, 1.0)

    # A logged step stands for those since the one before.
    edges = (found.first - found.steps_per_column + 0.5, found.last - found.steps_per_column + 0.5)

    def draw(axes: "Axes") -> None:
        from matplotlib import colormaps
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        image = axes.imshow(
            found.values,
            aspect="auto",
            interpolation="none",
            cmap=colormaps["viridis"].with_extremes(over=_ABOVE),
            vmin=low,
            vmax=max(high, low + 1e-12),
            extent=(*edges, found.ranks - 0.5, -0.5),
        )
        axes.grid(visible=False)
        axes.set_ylabel("rank")
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        steps_x(axes, *seen.step_range)
        by, unit = scale(high, "seconds")
        bar = axes.figure.colorbar(image, ax=axes, pad=0.01, aspect=18, extend="both")
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / by:.3g}"))
        bar.outline.set_visible(False)
        bar.set_label(unit)

    rank, column = np.unravel_index(np.nanargmax(found.values), found.values.shape) if len(known) else (0, 0)
    lowest, highest = rank * found.ranks_per_row, min(found.ranks, (rank + 1) * found.ranks_per_row) - 1
    where = f"rank {lowest}" if lowest == highest else f"one of ranks {lowest} to {highest}"
    alt = (
        f"Most ranks between {amount(float(low), 'seconds')} and {amount(float(high), 'seconds')}; longest"
        f" {amount(float(found.values[rank, column]), 'seconds')} on {where}"
        f" near step {found.first + column * found.steps_per_column:,.0f}"
    )
    notes = [f"Each column: mean of {found.steps_per_column:,.3g} steps" if found.steps_per_column > 1 else ""]
    notes += [f"Each row: the slowest of {found.ranks_per_row} ranks" if found.ranks_per_row > 1 else ""]
    height = 1.2 + min(3.0, 0.05 * len(found.values) + 0.6)
    svg = drawn(name, title, alt, (WIDE, height), draw)
    return Picture(
        name,
        title,
        alt,
        svg,
        wide=True,
        note=". ".join([*filter(None, notes), "Red: above the 99th percentile", alt]) + ".",
    )
