"""Line charts as SVG files for the documentation; equal figures give byte-identical files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from easyllm.reporting.line_chart import line_chart


def write_lines(
    file: Path,
    title: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_title: str,
    y_title: str,
    from_zero: bool = True,
) -> None:
    """Draws each series of points, with a legend and axes.

    Args:
        file: the file.
        title: the chart's title.
        lines: the points (x, y) of each series, by its name.
        x_title, y_title: what the axes show.
        from_zero: whether the y axis begins at 0; otherwise just below the lowest point.
    """
    svg = line_chart(title, lines, x_title=x_title, y_title=y_title, from_zero=from_zero)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(svg, encoding="utf-8")
