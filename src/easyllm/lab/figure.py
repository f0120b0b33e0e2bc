"""Figures of labs as SVG and PNG, with matplotlib; equal values give equal files."""

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from easyllm.core.errors import ConfigError, install
from easyllm.lab.lab import Bars, Figure, Grid, Lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure as Canvas

COLOURS = ("#1f6f6b", "#b4500f", "#5a4fa0", "#8a8f98", "#a02c4a", "#3d7ab8", "#7a8b2a", "#c9a227")
WIDTH, HEIGHT = 6.4, 3.9
"""Inches of one figure."""
MANY_LINES = 4
"""Lines beyond which the legend stands outside the axes."""
FEW_CELLS = 64
"""Cells of a grid up to which each shows its value."""
STYLE: Any = {
    "axes.prop_cycle": None,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "axes.axisbelow": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.edgecolor": "none",
    "legend.framealpha": 0.8,
    "svg.hashsalt": "easyllm",
    "svg.fonttype": "path",
}


def draw(figures: Sequence[Figure]) -> tuple[bytes, bytes]:
    """Returns figures next to each other as SVG and as PNG.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError(
            f"labs draw their figures with matplotlib, which is not installed; {install('lab')}"
        ) from None
    from cycler import cycler
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    style = STYLE | {"axes.prop_cycle": cycler(color=COLOURS)}
    with matplotlib.rc_context(style):
        canvas = Canvas(figsize=(WIDTH * len(figures), HEIGHT), layout="constrained")
        FigureCanvasAgg(canvas)
        axes = canvas.subplots(1, len(figures), squeeze=False)[0]
        for place, figure in zip(axes, figures, strict=True):
            _draw(canvas, place, figure)
        svg, png = io.BytesIO(), io.BytesIO()
        canvas.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        canvas.savefig(png, format="png", dpi=110, metadata={"Software": None})
    return _compact(svg.getvalue().decode()).encode(), png.getvalue()


def _compact(svg: str) -> str:
    """Returns the same drawing in fewer bytes: short names, coordinates to a hundredth."""
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = svg.replace("DejaVuSans-", "f").replace("xlink:href", "href")

    def rounded(match: re.Match[str]) -> str:
        return re.sub(
            r"-?\d+\.\d+", lambda n: f"{float(n[0]):.2f}".rstrip("0").rstrip("."), match[0]
        )

    return re.sub(r'\b(?:d|x|y|width|height)="[^"]*"|translate\([^)]*\)', rounded, svg)


def _draw(canvas: "Canvas", axes: "Axes", figure: Figure) -> None:
    axes.set_title(figure.title)
    axes.set_xlabel(figure.x)
    axes.set_ylabel(figure.y)
    if isinstance(figure, Lines):
        _draw_lines(axes, figure)
    elif isinstance(figure, Bars):
        _draw_bars(axes, figure)
    else:
        _draw_grid(canvas, axes, figure)


def _draw_lines(axes: "Axes", figure: Lines) -> None:
    for name, points in figure.lines.items():
        xs, ys = zip(*points, strict=True) if points else ((), ())
        axes.plot(xs, ys, label=name, marker="o" if figure.marks else None, markersize=4)
    if figure.log_x:
        axes.set_xscale("log")
        _label_log(axes.xaxis, [x for points in figure.lines.values() for x, _ in points])
    if figure.log_y:
        axes.set_yscale("log")
        _label_log(axes.yaxis, [y for points in figure.lines.values() for _, y in points])
    if len(figure.lines) > MANY_LINES:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    elif len(figure.lines) > 1:
        axes.legend()


def _label_log(axis: "Axis", values: Sequence[float]) -> None:
    """Labels a logarithmic axis with plain numbers, unless they would be very long."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    positive = [value for value in values if value > 0]
    if not positive:
        return
    low, high = min(positive), max(positive)
    axis.set_minor_formatter(NullFormatter())
    if high / low < 100:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    if low >= 1e-4 and high < 1e6:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _draw_bars(axes: "Axes", figure: Bars) -> None:
    count = len(figure.series)
    width = 0.8 / count
    for number, (name, values) in enumerate(figure.series.items()):
        offset = (number - (count - 1) / 2) * width
        places = [place + offset for place in range(len(figure.groups))]
        axes.bar(places, list(values), width, label=name)
    long = max((len(group) for group in figure.groups), default=0) * len(figure.groups) > 70
    axes.set_xticks(
        range(len(figure.groups)),
        list(figure.groups),
        rotation=30 if long else 0,
        ha="right" if long else "center",
    )
    axes.grid(visible=False, axis="x")
    if figure.log_y:
        axes.set_yscale("log")
        _label_log(axes.yaxis, [y for values in figure.series.values() for y in values])
    if count > 1:
        axes.legend()


def _draw_grid(canvas: "Canvas", axes: "Axes", figure: Grid) -> None:
    from matplotlib.ticker import MaxNLocator

    rows = [list(row) for row in figure.values]
    image = axes.imshow(rows, aspect="auto", cmap="viridis")
    axes.grid(visible=False)
    if figure.x_labels:
        axes.set_xticks(range(len(figure.x_labels)), list(figure.x_labels), rotation=45)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if figure.y_labels:
        axes.set_yticks(range(len(figure.y_labels)), list(figure.y_labels))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if sum(map(len, rows)) <= FEW_CELLS:
        values = [value for row in rows for value in row]
        middle = (max(values) + min(values)) / 2
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                colour = "black" if value > middle else "white"
                axes.text(x, y, f"{value:.2g}", ha="center", va="center", color=colour)
    canvas.colorbar(image, ax=axes)


__all__ = ["draw"]
