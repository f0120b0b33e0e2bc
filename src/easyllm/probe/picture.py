"""Pictures of probes as SVG files; equal figures give byte-identical files."""

import html
from collections.abc import Sequence

CELL_WIDTH, CELL_HEIGHT, LEFT, TOP = 46, 20, 110, 60


def heat_map(
    title: str,
    values: Sequence[Sequence[float]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    texts: Sequence[Sequence[str]] | None = None,
) -> str:
    """Returns a table of cells, darker for larger values (blue) and for more negative ones (red).

    Args:
        title: the title.
        values: the value of each cell, by row.
        rows, columns: their names.
        texts: what is written in each cell; the value by default.
    """
    most = max((abs(value) for row in values for value in row), default=0.0) or 1.0
    width = LEFT + CELL_WIDTH * len(columns) + 16
    height = TOP + CELL_HEIGHT * len(rows) + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="12" y="22" font-size="13" font-weight="bold">{html.escape(title)}</text>',
    ]
    for number, name in enumerate(columns):
        x = LEFT + CELL_WIDTH * number + CELL_WIDTH / 2
        parts.append(f'<text x="{x:g}" y="{TOP - 8}" text-anchor="middle">{_short(name)}</text>')
    for down, row in enumerate(values):
        y = TOP + CELL_HEIGHT * down
        label = html.escape(rows[down])
        parts.append(f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{label}</text>')
        for along, value in enumerate(row):
            x = LEFT + CELL_WIDTH * along
            share = abs(value) / most
            colour = _colour(share, negative=value < 0)
            ink = "white" if share > 0.6 else "#222"
            text = _short(f"{value:.2f}" if texts is None else texts[down][along])
            parts.append(
                f'<rect x="{x}" y="{y}" width="{CELL_WIDTH - 1}" height="{CELL_HEIGHT - 1}" '
                f'fill="{colour}"/>'
            )
            parts.append(
                f'<text x="{x + CELL_WIDTH / 2:g}" y="{y + 14}" fill="{ink}" '
                f'text-anchor="middle">{text}</text>'
            )
    return "\n".join([*parts, "</svg>", ""])


def _short(text: str, most: int = 7) -> str:
    text = text.replace("\n", "⏎")
    return html.escape(text if len(text) <= most else f"{text[: most - 1]}…")


def _colour(share: float, *, negative: bool) -> str:
    """Returns a colour between white and blue, or white and red."""
    dark = (160, 44, 60) if negative else (31, 90, 140)
    mixed = (round(255 + (end - 255) * share) for end in dark)
    return "#" + "".join(f"{part:02x}" for part in mixed)


__all__ = ["heat_map"]
