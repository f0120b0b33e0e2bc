"""Reads the JSON lines that easyllm itself appends to: `metrics.jsonl` of a run.

A run that was killed may leave a partial last line, and a full disk a damaged one. Such a log must
stay readable, so lines that are not JSON objects are skipped. Users' data files are read by
`easyllm.corpus.files` instead, which reports the location of every bad row.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from easyllm.core.json_types import JsonObject


def json_objects(data: bytes) -> Iterator[JsonObject]:
    """Yields the JSON object of each line, skipping lines that are not a JSON object.

    >>> list(json_objects(b'{"step": 1}\\n[2]\\n{"step": 3'))
    [{'step': 1}]
    """
    for line in data.splitlines():
        try:
            value = json.loads(line)
        except ValueError:  # not JSON, or not UTF-8
            continue
        if isinstance(value, dict):
            yield value


def read_json_objects(path: Path) -> list[JsonObject]:
    """Returns the JSON objects of a file, one per line; an empty list if there is no file."""
    return list(json_objects(path.read_bytes())) if path.is_file() else []
