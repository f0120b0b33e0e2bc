"""Checks that a finished corpus is complete, and that its sources are what it was built from.

`sources.json` has the size, modification time and hash of each file that was read. A corpus of an
older version has hashes only, in its manifest; the files are then read to compare them.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from easyllm.core.atomic import write_json
from easyllm.core.errors import DataError, OutputError
from easyllm.core.manifest import MANIFEST_FILE, Manifest, hash_file
from easyllm.corpus.shards import TokenShards
from easyllm.tokenizer.tokenizer import Tokenizer

SOURCES_FILE = "sources.json"
SHARDS, VALIDATION = "shards", "validation"
Stamp = tuple[int | None, int | None, str]
"""Size, modification time in ns, and SHA-256 of a file."""


def write_sources(output: Path, paths: Iterable[str]) -> dict[str, str]:
    """Records the files that a corpus was built from; returns the SHA-256 of each, by path."""
    found = {path: (*_size_and_time(path), hash_file(Path(path))) for path in sorted(set(paths))}
    write_json(output / SOURCES_FILE, found)
    return {path: digest for path, (_, _, digest) in found.items()}


def check_finished(output: Path, paths: Iterable[str], tokenizer: Tokenizer) -> None:
    """Checks the files of a finished corpus and those of its sources.

    Args:
        output: the folder of the corpus.
        paths: the files of its sources now.
        tokenizer: the tokenizer that its recipe names now.

    Raises:
        OutputError: a file of the corpus is missing or damaged, or a source has changed.
    """
    remedy = f"remove {str(output)!r} to build it again, or choose another folder with output=..."
    change = _first_change(*_recorded(output, set(paths)))
    if change is not None:
        raise OutputError(f"{change} since the corpus in {str(output)!r} was built; {remedy}")
    folders = [output / SHARDS]
    if Manifest.read(output / MANIFEST_FILE).results.get("held_out"):
        folders.append(output / SHARDS / VALIDATION)
    for folder in folders:
        try:
            TokenShards(folder, tokenizer=tokenizer)
        except DataError as error:
            what = str(error).partition("; ")[0]
            raise OutputError(
                f"the corpus in {str(output)!r} is not what its recipe builds: {what}; {remedy}"
            ) from None


def _recorded(output: Path, paths: set[str]) -> tuple[dict[str, Stamp], set[str]]:
    """Returns the recorded files, and the present ones that can be compared with them."""
    try:
        found = json.loads((output / SOURCES_FILE).read_text(encoding="utf-8"))
        return {path: (size, time, digest) for path, (size, time, digest) in found.items()}, paths
    except (OSError, ValueError, TypeError, AttributeError):  # of an older version, or damaged
        inputs = Manifest.read(output / MANIFEST_FILE).inputs
        both: dict[str, Stamp] = {
            path: (None, None, digest) for path, digest in inputs.items() if path in paths
        }
        return both, paths & both.keys()  # its evaluation sets were not recorded


def _first_change(recorded: dict[str, Stamp], paths: set[str]) -> str | None:
    """Describes the first difference between recorded and present files; None if there is none.

    A file that was moved or touched, but has the same content, has not changed.
    """
    for path in sorted(paths & recorded.keys()):
        size, time, digest = recorded[path]
        now = _size_and_time(path)
        if (size, time) != now and (size not in (None, now[0]) or hash_file(Path(path)) != digest):
            was = "" if size in (None, now[0]) else f" (from {size:,} to {now[0]:,} bytes)"
            return f"source file {path!r} has changed{was}"
    gone = {path: digest for path, (_, _, digest) in recorded.items() if path not in paths}
    for path in sorted(paths - recorded.keys()):
        digest = hash_file(Path(path))
        before = next((p for p, other in gone.items() if other == digest), None)
        if before is None:
            return f"source file {path!r} was added"
        del gone[before]
    return f"source file {next(iter(gone))!r} was removed" if gone else None


def _size_and_time(path: str) -> tuple[int, int]:
    stat = Path(path).stat()
    return stat.st_size, stat.st_mtime_ns


__all__ = ["SOURCES_FILE", "check_finished", "write_sources"]
