"""Figures as SVG that lies inside a page: its colours are the page's, its names are its own, its text is text."""

import html
import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

from fabriclite.errors import ConfigError
from fabriclite.watching.page.units import Unit, scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE: Final = 11.5  # inches, of a plot that takes the page's width
HALF: Final = 5.6
_POINTS: Final = 72

# Names of the page's colours; here, what stands for them in a figure. page.css says how each looks in light and dark.
COLOURS: Final = {
    "ink": "#010101",
    "muted": "#020202",
    "grid": "#030303",
    "paper": "#040404",
    "faint": "#050505",
    "bad": "#060606",
    **{f"c{number}": f"#1000{number:02x}" for number in range(10)},
}


def colour(number: int) -> str:
    """Of the ``number``-th thing."""
    return COLOURS[f"c{number % 10}"]


@dataclass(frozen=True, slots=True)
class Picture:
    """A plot of the page.

    Attributes:
        name: its ``id``.
        title: a short line.
        alt: what it shows, for who cannot see it.
        svg: to be put into the page as it is: all text in it is escaped.
        wide: whether it takes the page's width.
        key: (class of colour, text) of what its colours mean.
        note: a line below.
    """

    name: str
    title: str
    alt: str
    svg: str
    wide: bool = False
    key: tuple[tuple[str, str], ...] = ()
    note: str = ""


def clean(text: str) -> str:
    """Without what no page can hold: control characters and halves of characters."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)


def require_matplotlib() -> None:
    """Raises:
    ConfigError: it is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "`report` must draw with matplotlib, but it is not installed. Run pip install fabriclite[plots]."
        ) from error


def drawn(name: str, title: str, alt: str, size: tuple[float, float], draw: "Callable[[Axes], None]") -> str:
    """An SVG element.

    Args:
        name: its ``id``; must be one word.
        title: shown by screen readers first.
        alt: then this.
        size: in inches; the page stretches it to its width.
        draw: draws into the axes.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(cast(Any, _style())), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="matplotlib")  # glyphs its font lacks
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _inside_a_page(file.getvalue(), name, title, alt, size)


def _style() -> dict[str, Any]:
    ink, muted, grid = COLOURS["ink"], COLOURS["muted"], COLOURS["grid"]
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "fabriclite",
        "text.parse_math": False,  # names are no formulas
        "font.family": "DejaVu Sans",
        "font.size": 8.5,
        "axes.edgecolor": grid,
        "axes.labelcolor": muted,
        "axes.labelsize": 8,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": grid,
        "grid.linewidth": 0.5,
        "xtick.color": grid,
        "ytick.color": grid,
        "xtick.labelcolor": muted,
        "ytick.labelcolor": muted,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "text.color": ink,
        "lines.linewidth": 1.3,
        "path.simplify_threshold": 0.3,
        "figure.constrained_layout.h_pad": 0.03,
        "figure.constrained_layout.w_pad": 0.03,
    }


def _inside_a_page(svg: str, name: str, title: str, alt: str, size: tuple[float, float]) -> str:
    body = svg[svg.index("<svg") :]
    body = body[body.index(">") + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style[^>]*>.*?</style>", "", body, flags=re.DOTALL)  # it would hold for the whole page
    body = re.sub(r'\bid="', f'id="{name}--', body)
    body = re.sub(r'href="#', f'href="#{name}--', body)
    body = body.replace("url(#", f"url(#{name}--")
    for key, value in COLOURS.items():
        body = body.replace(value, f"var(--{key})")
    width, height = (round(side * _POINTS, 2) for side in size)
    return (
        f'<svg id="{name}" class="plot" viewBox="0 0 {width:g} {height:g}" role="img"'
        f' aria-labelledby="{name}-title {name}-alt" xmlns="http://www.w3.org/2000/svg"'
        ' xmlns:xlink="http://www.w3.org/1999/xlink">'
        f'<title id="{name}-title">{html.escape(clean(title))}</title>'
        f'<desc id="{name}-alt">{html.escape(clean(alt))}</desc>' + re.sub(r">\s+<", "><", body).rstrip()
    )


# -- axes -------------------------------------------------------------------------------------------------------------


def scale_y(axes: "Axes", unit: Unit) -> None:
    """Ticks in the largest unit that fits, named at the top of the axis."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    low, high = axes.get_ylim()
    by, name = scale(max(abs(low), abs(high)), unit)
    if unit:
        axes.yaxis.set_major_locator(_multiples(by))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / by:g}"))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, min_n_ticks=2))
        axes.ticklabel_format(axis="y", useOffset=False)
        if 1e3 <= max(abs(low), abs(high)) < 1e7:
            axes.yaxis.set_major_formatter(
                FuncFormatter(lambda value, _: f"{value:,.4g}" if value % 1 else f"{value:,.0f}")
            )
    axes.set_ylabel(name)


def _multiples(by: float) -> Any:
    """Round numbers of a unit that is no power of ten."""
    from matplotlib.ticker import MaxNLocator

    class Locator(MaxNLocator):
        def tick_values(self, vmin: float, vmax: float) -> Any:
            return [tick * by for tick in super().tick_values(vmin / by, vmax / by)]

    return Locator(5, min_n_ticks=2)


def log_y(axes: "Axes") -> None:
    """A logarithmic axis with plain numbers at it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    subs = (1.0, 2.0, 5.0) if high < 300 * low else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("log scale")


def steps_x(axes: "Axes", first: float, last: float) -> None:
    """Whole steps."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    edge = max((last - first) * 0.01, 0.5)
    axes.set_xlim(first - edge, last + edge)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("step")


def label_ends(axes: "Axes", ends: Sequence[tuple[float, str, str]]) -> None:
    """Write (height in data, text, colour) at the right edge, none over another."""
    height = axes.get_window_extent().height / axes.figure.dpi * _POINTS
    low, high = axes.transData.transform([(0, bound) for bound in axes.get_ylim()])[:, 1]
    places = []
    for value, text, ink in ends:
        at = (axes.transData.transform((0, value))[1] - low) / max(high - low, 1e-9)
        places.append((min(max(at, 0.0), 1.0), text, ink))
    least = 9.5 / height
    for taken, text, ink in _apart(places, least):
        axes.annotate(
            text, (1, taken), (3, 0), xycoords="axes fraction", textcoords="offset points", va="center", color=ink,
            fontsize=8, annotation_clip=False,
        )  # fmt: skip


def _apart(places: Sequence[tuple[float, str, str]], least: float) -> list[tuple[float, str, str]]:
    """The same, moved up until none is nearer to another than ``least``, then down until none is above 1."""
    found: list[tuple[float, str, str]] = []
    for at, text, ink in sorted(places):
        found.append((max(at, found[-1][0] + least) if found else at, text, ink))
    ceiling = 1.0
    for index in range(len(found) - 1, -1, -1):
        at, text, ink = found[index]
        found[index] = (min(at, ceiling), text, ink)
        ceiling = found[index][0] - least
    return found
