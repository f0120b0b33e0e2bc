"""Prints results on standard output: tables for people, JSON for scripts; shared options."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from easyllm.core.json_types import Json, JsonMapping, finite_json
from easyllm.core.paths import expanded

JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for scripts.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Recipe overrides: key.sub=value"),
]


def home_path(path: Path | None) -> Path | None:
    """Returns the path of an option with `~` expanded, which a shell does not do in quotes."""
    return None if path is None else expanded(path)


def print_json(value: object) -> None:
    """Prints `value` as indented JSON, in ASCII if the terminal's encoding lacks a character.

    Numbers that are not finite, which JSON does not have, become null.
    """
    value = finite_json(value)
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    sys.stdout.write(f"{text}\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table; if all columns have empty names, it has no header."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=title or None,
        title_justify="left",
        header_style="bold",
        show_header=any(columns),
    )
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    Console(highlight=False).print(table)


def print_pairs(values: JsonMapping) -> None:
    """Prints aligned `name  value` lines."""
    width = max(map(len, values), default=0)
    for name, value in values.items():
        sys.stdout.write(f"{name:<{width}}  {value}\n")


def figures_text(figures: JsonMapping) -> dict[str, str]:
    """Returns figures as text for `print_pairs`, without units in names: 1260912640 → `1.26 GB`.

    >>> figures_text({"peak_rss_bytes": 1260912640, "parts_bytes": {"weights": 2e9}, "steps": 5000})
    {'peak rss': '1.26 GB', 'parts': 'weights 2.00 GB', 'steps': '5,000'}
    """
    found = {}
    for name, value in figures.items():
        is_metric = "/" in name  # named as in metrics.jsonl
        plain = name.removesuffix("_bytes").replace("_nats", "").replace("_", " ")
        shown = name if is_metric else plain
        found[shown] = _figure_text(name, value)
    return found


def _figure_text(name: str, value: Json) -> str:
    if isinstance(value, Mapping):
        unit = "_bytes" if name.endswith("_bytes") else ""
        parts = {
            inner.replace("_", " "): _figure_text(inner + unit, v) for inner, v in value.items()
        }
        return ", ".join(f"{inner} {text}" for inner, text in parts.items())
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if name.endswith("_bytes"):
        return f"{value / 1e9:,.2f} GB"
    if name.endswith("seconds"):
        return f"{value:,.1f} s"
    if isinstance(value, float):
        unit = (
            " nats" if "_nats" in name and "/" not in name else ""
        )  # a metric's name has its unit
        return f"{value:,.6g}{unit}"
    return f"{value:,}"
