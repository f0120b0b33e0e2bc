"""Figures of labs as SVG and PNG, with matplotlib; equal values give equal files."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from easyllm.core.errors import ConfigError
from easyllm.lab.lab import Bars, Figure, Grid, Lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

COLOURS = ("#1f6f6b", "#b4500f", "#5a4fa0", "#8a8f98", "#a02c4a", "#3d7ab8", "#7a8b2a", "#c9a227")
WIDTH, HEIGHT = 6.4, 3.9
"""Inches of one figure."""
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
    "legend.frameon": False,
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
            "labs draw their figures with matplotlib, which is not installed; "
            "install it with: pip install 'easyllm-stack[lab]'"
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
    return svg.getvalue(), png.getvalue()


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
    if figure.log_y:
        axes.set_yscale("log")
    if len(figure.lines) > 1:
        axes.legend()


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
    if count > 1:
        axes.legend()


def _draw_grid(canvas: "Canvas", axes: "Axes", figure: Grid) -> None:
    image = axes.imshow([list(row) for row in figure.values], aspect="auto", cmap="viridis")
    axes.grid(visible=False)
    if figure.x_labels:
        axes.set_xticks(range(len(figure.x_labels)), list(figure.x_labels), rotation=45)
    if figure.y_labels:
        axes.set_yticks(range(len(figure.y_labels)), list(figure.y_labels))
    canvas.colorbar(image, ax=axes)


__all__ = ["draw"]
