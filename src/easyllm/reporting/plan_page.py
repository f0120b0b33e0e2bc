"""The HTML page of `easyllm plan --html`: figures, bars of memory by component, line charts."""

from collections.abc import Mapping, Sequence

from easyllm.reporting.charts import escaped
from easyllm.reporting.line_chart import COLOURS, line_chart
from easyllm.reporting.static import STYLE

OWN_STYLE = """
.bar { display: flex; height: 1.6rem; border-radius: .4rem; overflow: hidden; margin: .3rem 0; }
.bar i { display: block; min-width: 2px; }
.bars li { display: inline-block; margin-right: 1.1rem; }
.bars li::before { border-top-color: var(--own); }
.bars ul { list-style: none; padding: 0; margin: 0 0 1rem; }
figure svg { border: 0; border-radius: .4rem; }
td:first-child { width: auto; }
"""
Lines = Mapping[str, Sequence[tuple[float, float]]]


def plan_page(
    title: str,
    facts: Mapping[str, str],
    memory: Mapping[str, Mapping[str, int]],
    charts: Sequence[tuple[str, str, str, Lines]],
) -> str:
    """Returns a page without scripts or links.

    Args:
        title: what is planned.
        facts: figures as text, by name.
        memory: for each use, bytes by component.
        charts: title, titles of both axes, and lines of each chart.
    """
    rows = "".join(
        f"<tr><td>{escaped(name)}</td><td>{escaped(value)}</td></tr>"
        for name, value in facts.items()
    )
    widest = max((sum(parts.values()) for parts in memory.values()), default=1)
    bars = "".join(_bar(name, parts, widest) for name, parts in memory.items())
    figures = "".join(
        f"<figure>{line_chart(name, lines, x_title=x_title, y_title=y_title)}</figure>"
        for name, x_title, y_title, lines in charts
        if any(lines.values())
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{STYLE}{OWN_STYLE}</style></head>\n<body>"
        f"<header><h1>{escaped(title)}</h1></header>\n"
        f'<div class="table"><table>{rows}</table></div>\n'
        f'<h2>Memory by component</h2><section class="bars">{bars}</section>\n'
        f'<section class="charts">{figures}</section></body></html>\n'
    )


def _bar(name: str, parts: Mapping[str, int], widest: int) -> str:
    """Returns a bar whose length is its total relative to the widest, with a legend."""
    shown = [(part, size) for part, size in parts.items() if size > 0]
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(shown))]
    total = sum(size for _, size in shown)
    pieces = "".join(
        f'<i style="flex:{size};background:{colour}"></i>'
        for (_, size), colour in zip(shown, colours, strict=True)
    )
    legend = "".join(
        f'<li style="--own:{colour}"><span style="color:{colour}">■</span> '
        f"{escaped(part.replace('_', ' '))} {size / 1e9:,.2f} GB</li>"
        for (part, size), colour in zip(shown, colours, strict=True)
    )
    return (
        f"<h3>{escaped(name)}: {total / 1e9:,.2f} GB</h3>"
        f'<div class="bar" style="width:{max(1.0, 100 * total / widest):.2f}%">{pieces}</div>'
        f"<ul>{legend}</ul>"
    )


__all__ = ["plan_page"]
