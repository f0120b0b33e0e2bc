"""Finds the files of a source: expands patterns and folders, and detects formats by suffix."""

import glob
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from easyllm.core.errors import SourceError
from easyllm.corpus.files.blocks import COMPRESSIONS

Format = Literal["text", "markdown", "html", "csv", "json", "jsonl", "parquet"]
SUFFIXES: dict[str, Format] = {
    ".txt": "text",
    ".text": "text",
    ".md": "markdown",
    ".markdown": "markdown",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One file of a source.

    Attributes:
        path: absolute path.
        name: unique in its source and independent of where the data is stored; ids and locations
            of rows begin with it.
        format: format of the decompressed content.
    """

    path: str
    name: str
    format: Format


def find_files(paths: Iterable[str], format: Format | None) -> list[SourceFile]:
    """Returns the files that `paths` (files, folders, patterns) match, each once, sorted by name.

    In a folder, files are selected by suffix; hidden files and other suffixes are skipped. Files
    given directly or matched by a pattern are always included. Names are relative to the folder
    that contains the given path; if two files would have the same name, the paths as given are
    the names of all files.

    Args:
        format: format of every file; None detects it by suffix.

    Raises:
        SourceError: a path matches nothing, or a file has an unknown suffix.
    """
    found: dict[str, tuple[_Match, Format]] = {}
    for given in paths:
        chosen = _choose(given, format)
        found |= {path: match for path, match in chosen.items() if path not in found}
    shorts = {_printable(match.short) for match, _ in found.values()}
    is_short = len(shorts) == len(found)
    files = [
        SourceFile(path=path, name=_printable(match.short if is_short else match.long), format=kind)
        for path, (match, kind) in found.items()
    ]
    return sorted(files, key=lambda file: (file.name, file.path))


def plain_suffix(path: str) -> str:
    """Returns the suffix that gives the format: the last one, without a compression suffix."""
    path = path.lower()
    for compression in COMPRESSIONS:
        path = path.removesuffix(compression)
    return PurePath(path).suffix


@dataclass(frozen=True, slots=True)
class _Match:
    path: str
    short: str
    long: str
    in_folder: bool


def _choose(given: str, format: Format | None) -> dict[str, tuple[_Match, Format]]:
    """Returns the files that one path matches with their formats, by absolute path."""
    chosen: dict[str, tuple[_Match, Format]] = {}
    others: Counter[str] = Counter()
    for match in _follow(given):
        told = SUFFIXES.get(plain_suffix(match.path))
        if match.in_folder and (told is None or format not in (None, told)):
            others[plain_suffix(match.path) or "none"] += 1
            continue
        kind = format or told
        if kind is None:
            raise SourceError(
                f"cannot detect the format of {match.path!r} by its suffix (known: "
                f"{', '.join(SUFFIXES)}, each also with {' or '.join(COMPRESSIONS)}); "
                "set format, or give other files"
            )
        if kind == "parquet" and match.path.lower().endswith(COMPRESSIONS):
            raise SourceError(
                f"{match.path!r} is a compressed Parquet file, which cannot be read in parts; "
                "decompress it"
            )
        chosen.setdefault(os.path.abspath(match.path), (match, kind))
    suffixes = ", ".join(f"{suffix} ({count})" for suffix, count in others.most_common(8))
    if not chosen:
        raise SourceError(_no_files_message(given, format, suffixes))
    if others:
        logger.warning("%s: skipped files with other suffixes: %s", given, suffixes)
    return chosen


def _no_files_message(given: str, format: Format | None, suffixes: str) -> str:
    if suffixes:
        wanted = [suffix for suffix, told in SUFFIXES.items() if format in (None, told)]
        return (
            f"source path {given!r} contains no file with a suffix of {', '.join(wanted)}, "
            f"only {suffixes}; give the files as a pattern (folder/*) and set format"
        )
    if os.path.isdir(os.path.expanduser(given)):
        return f"source path {given!r} is a folder without files; add files or give another folder"
    return (
        f"source path {given!r} matches no file; "
        "give a file, a folder or a pattern like data/*.jsonl"
    )


def _follow(given: str) -> Iterator[_Match]:
    path = os.path.expanduser(given)
    if os.path.isfile(path):
        yield _Match(path, os.path.basename(path), os.path.normpath(path), False)
    elif os.path.isdir(path):
        label = os.path.basename(os.path.normpath(path))
        yield from _below(path, "" if label in (".", "..") else label)
    else:
        root = _part_without_wildcards(path)
        for match in glob.iglob(path, recursive=True):
            short = os.path.relpath(match, root)
            if os.path.isfile(match):
                yield _Match(match, short, os.path.normpath(match), False)
            elif os.path.isdir(match):
                yield from _below(match, short)


def _below(folder: str, label: str) -> Iterator[_Match]:
    """Yields the files in a folder tree; follows links, but visits no folder twice."""
    seen = set()
    for here, folders, files in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if os.path.realpath(here) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(here))
        for name in files:
            path = os.path.join(here, name)
            if not name.startswith(".") and os.path.isfile(path):
                short = os.path.normpath(os.path.join(label, os.path.relpath(path, folder)))
                yield _Match(path, short, os.path.normpath(path), True)


def _refuse_folder(error: OSError) -> None:
    raise SourceError(f"cannot read folder {error.filename!r}: {error.strerror}") from None


def _part_without_wildcards(pattern: str) -> str:
    fixed = PurePath()
    for part in PurePath(pattern).parts[:-1]:
        if glob.escape(part) != part:
            break
        fixed /= part
    return str(fixed)


def _printable(name: str) -> str:
    """Returns a name as valid UTF-8 with forward slashes; file names may be invalid UTF-8."""
    return name.replace(os.sep, "/").encode("utf-8", "backslashreplace").decode("utf-8")
