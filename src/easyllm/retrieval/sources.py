"""Whether the documents of an index are still what was indexed."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from easyllm.core.errors import DataError
from easyllm.retrieval.documents import read_content
from easyllm.retrieval.index import IndexState


def changed_sources(state: IndexState, names: Iterable[str]) -> list[str]:
    """Returns those of some documents whose file differs from what was indexed, or is missing."""
    root = Path(state.root)
    found = list[str]()
    for name in sorted(names):
        path = root if root.is_file() else root / name
        try:
            digest = hashlib.sha256(read_content(path)).hexdigest()
        except DataError:
            digest = ""
        if digest != state.documents[name]["sha256"]:
            found.append(name)
    return found


__all__ = ["changed_sources"]
