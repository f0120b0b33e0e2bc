"""An index of chunks on disk: vectors, postings and texts, in segments that never change.

    index.json          what exists: the embedding model, the documents, the segments
    segments/NAME/      vectors.npy [N, dim] fp16, postings (`bm25`), chunks.jsonl, offsets.npy

`index.json` is the only file that changes, and it is replaced atomically after the segments it
names are complete. Whatever interrupts a build, the index opens as it was before or after a step.
Chunks of documents that were changed or removed stay in their segment, but are not live.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from easyllm.core.atomic import atomic_directory, write_json
from easyllm.core.errors import CheckpointError, ConfigError, SourceError
from easyllm.core.json_types import JsonObject
from easyllm.embed.embedder import Embedder, Vectors
from easyllm.retrieval.bm25 import Postings, bm25
from easyllm.retrieval.terms import terms
from easyllm.retrieval.vectors import best, load_vectors, save_vectors, similarities

INDEX_FILE, SEGMENTS = "index.json", "segments"
VERSION = 1
SAME_MODEL = 0.999
"""Least cosine between the vectors of a fixed text for two models to be the same: rounding differs
between machines by less, quantization by more."""
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredChunk:
    """A chunk as it is stored and cited.

    Attributes:
        row: its number in the index; changes when the index is compacted.
        document: name of its document.
        start, end: its span of characters in the document's text.
        text: its text.
        headings: the headings above it, outermost first.
        page: for a PDF, the page on which it begins, from 1.
    """

    row: int
    document: str
    start: int
    end: int
    text: str
    headings: tuple[str, ...] = ()
    page: int | None = None

    @property
    def titled(self) -> str:
        """The text after its headings, as it is embedded and searched."""
        return "\n".join([" > ".join(self.headings), self.text]) if self.headings else self.text


@dataclass(slots=True)
class IndexState:
    """The contents of `index.json`.

    Attributes:
        embedder: name, dimensions, pooling and probe vector of the embedding model.
        root: the indexed folder or file, absolute.
        chunking: the configuration of chunks.
        segments: names of the segments in order, with their numbers of chunks.
        documents: by name: SHA-256, segment, first row in it and number of chunks.
        refused: files that could not be read, with the reason.
        version: version of the layout.
    """

    embedder: JsonObject
    root: str
    chunking: JsonObject
    segments: dict[str, int] = field(default_factory=dict)
    documents: dict[str, JsonObject] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    version: int = VERSION

    def save(self, folder: Path) -> None:
        """Replaces `index.json` atomically."""
        write_json(folder / INDEX_FILE, asdict(self))


def read_state(folder: Path) -> IndexState:
    """Reads `index.json`.

    Raises:
        SourceError: the folder contains no index.
        CheckpointError: the file is damaged or of another version.
    """
    file = folder / INDEX_FILE
    if not file.is_file():
        raise SourceError(
            f"folder {str(folder)!r} contains no index; build one: easyllm rag index DIR {folder}"
        )
    try:
        state = IndexState(**json.loads(file.read_bytes()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); build the index again") from None
    if state.version != VERSION:
        raise CheckpointError(
            f"{file} has version {state.version}, expected {VERSION}; build the index again"
        )
    return state


def write_segment(folder: Path, name: str, chunks: Sequence[StoredChunk], vectors: Vectors) -> None:
    """Writes a segment atomically; it takes effect when `index.json` names it."""
    with atomic_directory(folder / SEGMENTS / name, replace=True) as work:
        save_vectors(work / "vectors.npy", vectors)
        Postings.build(terms(chunk.titled) for chunk in chunks).save(work)
        offsets = [0]
        with (work / "chunks.jsonl").open("wb") as file:
            for chunk in chunks:
                record = {k: v for k, v in asdict(chunk).items() if k != "row"}
                file.write(json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n")
                offsets.append(file.tell())
        np.save(work / "offsets.npy", np.asarray(offsets, np.int64))


class _Segment:
    """The mapped files of a segment."""

    def __init__(self, folder: Path, count: int, first: int) -> None:
        self.folder, self.count, self.first = folder, count, first
        try:
            self.vectors = load_vectors(folder / "vectors.npy")
            self.postings = Postings.load(folder)
            self.offsets = np.load(folder / "offsets.npy", mmap_mode="r")
            self.records = np.memmap(folder / "chunks.jsonl", np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"segment {folder} is missing or damaged ({error}); remove the index and build it "
                "again"
            ) from None
        if not len(self.vectors) == len(self.postings.lengths) == len(self.offsets) - 1 == count:
            raise CheckpointError(
                f"segment {folder} has not the {count} chunks that {INDEX_FILE} names; remove the "
                "index and build it again"
            )
        self.live = np.zeros(count, bool)
        self.owners = np.zeros(count, np.int32)  # the number of each live chunk's document

    def chunk(self, row: int) -> StoredChunk:
        """Reads a chunk by its row in the segment."""
        start, end = int(self.offsets[row]), int(self.offsets[row + 1])
        record = json.loads(self.records[start:end].tobytes())
        record["headings"] = tuple(record["headings"])
        return StoredChunk(row=self.first + row, **record)


class Index:
    """An index, open for searching.

    Args:
        folder: its folder.

    Raises:
        SourceError: the folder contains no index.
        CheckpointError: a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.state = read_state(self.folder)
        self.segments = list[_Segment]()
        by_name, first = dict[str, _Segment](), 0
        for name, count in self.state.segments.items():
            by_name[name] = _Segment(self.folder / SEGMENTS / name, count, first)
            self.segments.append(by_name[name])
            first += count
        self._names = list(self.state.documents)
        for number, document in enumerate(self.state.documents.values()):
            segment, start = by_name[document["segment"]], document["first"]
            segment.live[start : start + document["count"]] = True
            segment.owners[start : start + document["count"]] = number

    @property
    def num_chunks(self) -> int:
        """Number of live chunks."""
        return sum(int(mask.sum()) for mask in self.live)

    @cached_property
    def live(self) -> list[Array]:
        """Per segment, [N] bool: the chunks of current documents."""
        return [segment.live for segment in self.segments]

    def nearest(self, query: Vectors, k: int) -> list[tuple[int, float]]:
        """Returns the k chunks whose vectors have the largest cosine with `query: [dim]`."""
        return best([similarities(s.vectors, query) for s in self.segments], self.live, k)

    def matching(self, question: str, k: int) -> list[tuple[int, float]]:
        """Returns the k chunks with the largest BM25 scores, without those that score 0."""
        scores = bm25([s.postings for s in self.segments], self.live, terms(question))
        return [(row, score) for row, score in best(scores, self.live, k) if score > 0]

    def chunk(self, row: int) -> StoredChunk:
        """Returns a chunk by its number."""
        segment = self._segment(row)
        return segment.chunk(row - segment.first)

    def document_of(self, row: int) -> str:
        """Returns the name of a live chunk's document."""
        segment = self._segment(row)
        return self._names[int(segment.owners[row - segment.first])]

    def _segment(self, row: int) -> _Segment:
        return next(s for s in self.segments if row < s.first + s.count)

    def vector(self, row: int) -> Vectors:
        """Returns the stored vector of a chunk, [dim] fp32."""
        segment = self._segment(row)
        found: Vectors = segment.vectors[row - segment.first].astype(np.float32)
        return found

    def around(self, chunk: StoredChunk, reach: int) -> list[StoredChunk]:
        """Returns a chunk with up to `reach` chunks of its document before and after it."""
        document = self.state.documents[chunk.document]
        first = list(self.state.segments).index(document["segment"])
        begin = self.segments[first].first + document["first"]
        end = begin + document["count"]
        rows = range(max(begin, chunk.row - reach), min(end, chunk.row + reach + 1))
        return [self.chunk(row) for row in rows]

    def check_embedder(self, embedder: Embedder) -> None:
        """Refuses an embedding model other than the one that made the vectors.

        Raises:
            ConfigError: it is another model, or has another number of dimensions.
        """
        check_embedder(self.state, embedder, self.folder)


def check_embedder(state: IndexState, embedder: Embedder, folder: Path) -> None:
    """Refuses an embedding model other than that of an index; see `Index.check_embedder`."""
    made = state.embedder
    remedy = f"use --embedder {made['name']}, or build another index"
    if embedder.dim != made["dim"]:
        raise ConfigError(
            f"the index {str(folder)!r} has vectors of {made['dim']} dimensions (embedding model "
            f"{made['name']!r}), but {embedder.name!r} has {embedder.dim}; {remedy}"
        )
    cosine = float(np.dot(np.asarray(made["probe"], np.float32), embedder.probe()))
    if cosine < SAME_MODEL:
        raise ConfigError(
            f"the index {str(folder)!r} was built with the embedding model {made['name']!r}, and "
            f"{embedder.name!r} gives other vectors (cosine {cosine:.3f} on a fixed text); {remedy}"
        )


def describe_embedder(embedder: Embedder) -> JsonObject:
    """Returns what `index.json` stores of an embedding model."""
    return {
        "name": embedder.name,
        "dim": embedder.dim,
        "pooling": embedder.pooling,
        "probe": [round(float(x), 5) for x in embedder.probe()],
    }


__all__ = [
    "INDEX_FILE",
    "SEGMENTS",
    "Index",
    "IndexState",
    "StoredChunk",
    "check_embedder",
    "describe_embedder",
    "read_state",
    "write_segment",
]
