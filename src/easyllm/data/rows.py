"""Rows of data files: JSON arrays and JSON lines, each row with the place it came from."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyllm.core.errors import DataError
from easyllm.data.blocks import COMPRESSIONS
from easyllm.data.source_files import SUFFIXES


@dataclass(frozen=True, slots=True)
class Row:
    """One object of a data file and where it stands (`file:line`, or `file[index]` in an array)."""

    values: dict[str, Any]
    place: str


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a `.jsonl` file (an object a line) or a `.json` file (an array of objects).

    Raises:
        DataError: the file is missing or of another kind, or a line is not a JSON object (file and line are named).
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"data file {str(path)!r} does not exist; name a .json or .jsonl file")
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS or SUFFIXES.get(suffix, "jsonl") not in ("json", "jsonl", "text"):
        raise DataError(
            f"data file {str(path)!r} is a {path.suffix} file, expected .json (an array of objects) or .jsonl "
            "(an object a line); unpack or convert it"
        )
    if path.suffix == ".json":
        yield from _array_rows(path)
    else:
        yield from _line_rows(path)


def _line_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                values = json.loads(line)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{place} is not UTF-8 text ({error.reason}); mend or remove the line"
                ) from None
            except ValueError as error:
                raise DataError(f"{place} is not JSON ({error}); mend or remove the line") from None
            yield _row(values, place)


def _array_rows(path: Path) -> Iterator[Row]:
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(
            f"{path} is not JSON ({error}); a file with an object a line is named .jsonl"
        ) from None
    if not isinstance(values, list):
        raise DataError(
            f"{path} holds a JSON {type(values).__name__}, expected an array of objects"
        )
    for index, entry in enumerate(values):
        yield _row(entry, f"{path}[{index}]")


def _row(values: Any, place: str) -> Row:
    if not isinstance(values, dict):
        raise DataError(
            f"{place} holds a JSON {type(values).__name__}, expected an object like "
            '{"prompt": "...", "completion": "..."}'
        )
    return Row(values, place)
