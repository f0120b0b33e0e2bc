"""Files of JSON lines, as the generators of data sets write them."""

import json
from collections.abc import Iterable
from pathlib import Path


def write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Writes rows as JSON lines."""
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
