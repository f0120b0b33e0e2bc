"""Prints results on standard output: tables for people, JSON for scripts; shared options."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from easyllm.core.json_types import JsonMapping, finite_json
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
