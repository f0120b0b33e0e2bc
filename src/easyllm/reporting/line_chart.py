"""A line chart as an SVG file; equal figures give byte-identical files."""

import html
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 64, 24, 66, 46
COLOURS = ("#1f6f6b", "#b4500f", "#5a4fa0", "#8a8f98", "#a02c4a")


def line_chart(
    title: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_title: str,
    y_title: str,
    from_zero: bool = True,
) -> str:
    """Returns each series of points as SVG, with a legend and axes.

    Args:
        title: the chart's title.
        lines: the points (x, y) of each series, by its name.
        x_title, y_title: what the axes show.
        from_zero: whether the y axis begins at 0; otherwise just below the lowest point.
    """
    points = [point for line in lines.values() for point in line]
    x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
    y0, y1 = min(p[1] for p in points), max(p[1] for p in points) * 1.05
    if from_zero:
        y0 = min(0.0, y0)
    else:
        margin = (max(p[1] for p in points) - y0) / 20
        y0, y1 = y0 - margin, max(p[1] for p in points) + margin
    x1, y1 = x1 if x1 > x0 else x0 + 1, y1 if y1 > y0 else y0 + 1

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-weight="bold">{html.escape(title)}</text>',
    ]
    for value in _ticks(y0, y1):
        _, y = place(x0, value)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in _ticks(x0, x1):
        x, _ = place(value, y0)
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:g}</text>'
        )
    below, above = html.escape(x_title), html.escape(y_title)
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{below}</text>')
    parts.append(f'<text x="{LEFT}" y="40" fill="#666">{above}</text>')
    along = LEFT
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>'
        )
        parts.append(f'<path d="M{along} {TOP - 12}h18" stroke="{colour}" stroke-width="3"/>')
        label = html.escape(name)
        parts.append(f'<text x="{along + 24}" y="{TOP - 8}" fill="{colour}">{label}</text>')
        along += 48 + 7 * len(name)
    return "\n".join([*parts, "</svg>", ""])


def _ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Returns round values between the two."""
    step = 10.0 ** len(str(int(high - low)))
    while (high - low) / step < most / 2.5:
        step /= 2 if str(step).strip("0.")[:1] in "124" else 2.5
    first = int(low / step) * step
    return [first + i * step for i in range(most * 3) if low <= first + i * step <= high]


__all__ = ["line_chart"]
