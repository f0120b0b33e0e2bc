"""Reads the rows of a training data file: JSON lines or a JSON array, plain or compressed.

The readers are those of a corpus (`readers`), but a bad row is an error here, because training
files are curated by hand.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from easyllm.core.errors import DataError
from easyllm.core.json_types import JsonObject
from easyllm.corpus.files.blocks import COMPRESSIONS, DamagedFile, read_blocks
from easyllm.corpus.files.formats import BadRow, read_json, read_jsonl
from easyllm.corpus.files.paths import SUFFIXES, plain_suffix
from easyllm.corpus.files.row import Row

__all__ = ["Row", "read_rows"]

EXPECTED = ".json (an array of objects) or .jsonl (one object per line)"
_CONTENTS = (  # magic bytes, name of the format, suffix
    (b"\x1f\x8b", "gzip", ".gz"),
    (b"\x28\xb5\x2f\xfd", "Zstandard", ".zst"),
    (b"\xfd7zXZ\x00", "xz", ".xz"),
    (b"BZh", "bzip2", ".bz2"),
    (b"PK\x03\x04", "a zip archive", None),
    (b"PAR1", "Parquet", None),
    (b"SQLite format 3\x00", "an SQLite database", None),
)
_NAMED = 3


def read_rows(path: Path) -> Iterator[Row]:
    """Yields the rows of a `.jsonl` file (one object per line) or `.json` file (array of objects).

    Both may be compressed.

    Raises:
        DataError: the file is missing, empty or of another format, or a line is not a JSON object
            or contains an unpaired surrogate (the message gives file and line).
    """
    path = Path(path)
    _check_file(path)
    read = read_json if plain_suffix(str(path)) == ".json" else read_jsonl
    is_empty = True
    try:
        for row in read(read_blocks(str(path)), str(path)):
            if isinstance(row, BadRow):
                verb = "contains" if row.reason.startswith("a JSON") else "is"
                raise DataError(f"{row.location} {verb} {row.reason}; fix or remove it")
            if not _is_text(row.values):
                raise DataError(
                    f"{row.location} contains an unpaired surrogate, such as \\ud800, which UTF-8 "
                    "cannot encode; fix or remove it"
                )
            is_empty = False
            yield row
    except DamagedFile as error:
        raise DataError(f"data file {str(path)!r} cannot be read to its end: {error}") from None
    if is_empty:
        is_blank = path.stat().st_size == 0
        raise DataError(
            f"data file {str(path)!r} {'is empty' if is_blank else 'contains no rows'}; "
            f"give {EXPECTED} with at least one object"
        )


def _is_text(values: JsonObject) -> bool:
    """Returns whether UTF-8 can encode all strings of a row."""
    try:
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _check_file(path: Path) -> None:
    """Raises a `DataError` with the reason if the path cannot be a file of rows."""
    if path.is_dir():
        files = sorted(
            file.name for file in path.iterdir() if plain_suffix(file.name) in (".json", ".jsonl")
        )
        shown = ", ".join(files[:_NAMED]) + (", ..." if len(files) > _NAMED else "")
        raise DataError(
            f"data file {str(path)!r} is a folder; name the files in it"
            + (
                f" (it contains {shown})"
                if files
                else f", which must be {EXPECTED}: it contains none"
            )
        )
    if not path.exists():
        raise DataError(f"data file {str(path)!r} does not exist; name a .json or .jsonl file")
    if not path.is_file():
        raise DataError(f"data file {str(path)!r} is not a regular file; give {EXPECTED}")
    suffix = plain_suffix(str(path))
    if SUFFIXES.get(suffix, "jsonl") not in ("json", "jsonl", "text"):
        raise DataError(
            f"data file {str(path)!r} is a {suffix} file, expected {EXPECTED}; convert it"
        )
    if path.suffix.lower() in COMPRESSIONS:
        return
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise DataError(f"cannot read data file {str(path)!r}: {error.strerror}") from None
    for beginning, kind, ending in _CONTENTS:
        if head.startswith(beginning):
            remedy = f"rename it to end in {ending}" if ending else f"convert it to {EXPECTED}"
            raise DataError(f"data file {str(path)!r} contains {kind}, not JSON; {remedy}")
