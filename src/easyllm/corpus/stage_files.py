"""Files of documents between stages: compressed JSON Lines, byte-identical for equal documents."""

import io
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from easyllm.core.atomic import output_errors
from easyllm.core.json_types import JsonObject
from easyllm.corpus.document import Document, Rejection
from easyllm.corpus.files.blocks import optional

LEVEL = 3
SUFFIX = ".jsonl.zst"


@contextmanager
def line_writer(path: Path) -> Iterator["LineWriter"]:
    """Context manager that writes a JSON Lines file atomically: only if the block succeeds."""
    zstandard = optional("zstandard", "compressed JSON lines")
    work = path.with_name(f".{path.name}.partial")
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with (
                work.open("wb") as file,
                zstandard.ZstdCompressor(level=LEVEL).stream_writer(file) as stream,
            ):
                yield LineWriter(stream)
            work.replace(path)
        except BaseException:
            work.unlink(missing_ok=True)
            raise


class LineWriter:
    """Writes JSON Lines to a compressed stream."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def write(self, values: JsonObject) -> None:
        """Appends one line."""
        self._stream.write(json.dumps(values, ensure_ascii=False).encode("utf-8") + b"\n")

    def document(self, document: Document) -> None:
        """Appends a document."""
        self.write(asdict(document))

    def rejection(self, rejection: Rejection) -> None:
        """Appends a rejected document with the violated rule and the value of its metric."""
        reason = {"rule": rejection.rule, "value": rejection.value}
        self.write(reason | asdict(rejection.document))


def read_lines(path: Path) -> Iterator[JsonObject]:
    """Yields the objects of a file that `line_writer` wrote."""
    zstandard = optional("zstandard", "compressed JSON lines")
    with (
        path.open("rb") as file,
        zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as stream,
    ):
        for line in io.TextIOWrapper(stream, encoding="utf-8"):
            yield json.loads(line)


def read_documents(path: Path) -> Iterator[Document]:
    """Returns an iterator over the documents of a file."""
    return (Document(**values) for values in read_lines(path))


def concatenate(parts: Iterable[Path], path: Path) -> None:
    """Concatenates compressed files; a Zstandard file may consist of several frames."""
    work = path.with_name(f".{path.name}.partial")
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with work.open("wb") as out:
            for part in parts:
                out.write(part.read_bytes())
        work.replace(path)
