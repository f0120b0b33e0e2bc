"""Builds an index of a folder, or updates it: only new and changed documents are embedded.

Documents are processed in groups; after each, the index on disk contains them. A build that is
interrupted continues where it stopped.
"""

import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from easyllm.core.atomic import check_output_free, check_writable
from easyllm.core.errors import ConfigError, DataError, SourceError
from easyllm.core.folder_lock import locked_folder
from easyllm.core.json_types import JsonObject
from easyllm.core.progress import Progress
from easyllm.embed.embedder import Embedder, Vectors
from easyllm.retrieval.chunk import ChunkConfig, split_document
from easyllm.retrieval.documents import KINDS, Document, read_document
from easyllm.retrieval.index import (
    INDEX_FILE,
    SEGMENTS,
    Index,
    IndexState,
    StoredChunk,
    check_embedder,
    describe_embedder,
    read_state,
    write_segment,
)

GROUP_CHUNKS = 512
"""Chunks after which a group of documents is written."""
MAX_SEGMENTS = 16
MAX_DEAD = 0.3
"""Share of chunks that are no longer live above which an index is compacted."""


@dataclass(slots=True)
class BuildReport:
    """What a build did: numbers of documents, and the live chunks after it."""

    added: int = 0
    changed: int = 0
    removed: int = 0
    unchanged: int = 0
    ignored: int = 0
    chunks: int = 0
    refused: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> JsonObject:
        """Returns plain values for JSON."""
        return asdict(self)


def build_index(
    root: Path,
    folder: Path,
    embedder: Embedder,
    config: ChunkConfig | None = None,
) -> BuildReport:
    """Indexes a file or a folder, or brings its index up to date.

    Args:
        root: the document, or the folder with documents; hidden files are ignored.
        folder: the index.
        embedder: the embedding model.
        config: how documents are split; by default as before, or `ChunkConfig()`.

    Raises:
        SourceError: there is no document.
        DataError: no document can be read; the message has the first reason.
        ConfigError: the index was built from another folder, with another embedding model, or with
            chunks of another size.
    """
    files, ignored = document_files(root)
    state = _earlier(folder, root, config)
    if state is None:
        chosen = (config or ChunkConfig()).model_dump()
        state = IndexState(
            embedder=describe_embedder(embedder), root=str(root.absolute()), chunking=chosen
        )
    else:
        check_embedder(state, embedder, folder)
    report = BuildReport(ignored=ignored)
    with locked_folder(folder):
        _remove_unnamed(folder, state)
        gone = [name for name in state.documents if name not in files]
        for name in gone:
            del state.documents[name]
        report.removed = len(gone)
        with Progress("indexing", total=len(files), unit="document") as progress:
            documents = _to_embed(files, state, report, progress)
            add_documents(documents, folder, embedder, state)
        if not state.documents and report.refused:
            reason = next(iter(report.refused.values()))
            raise _none_readable(len(files), reason)
        state.refused = report.refused
        state.save(folder)
        compact(folder, state)
        report.chunks = Index(folder).num_chunks
    return report


def check_build(root: Path, folder: Path, config: ChunkConfig | None = None) -> None:
    """Checks, before an embedding model is loaded, that an index can be built.

    Args:
        root, folder, config: as for `build_index`.

    Raises:
        SourceError, DataError, ConfigError: as for `build_index`.
        OutputError: the folder has other contents than an index, or cannot be written.
    """
    files, _ = document_files(root)
    if _earlier(folder, root, config) is None and not (folder / SEGMENTS).is_dir():
        check_output_free(folder)
    else:  # an index, or what an interrupted build has left
        check_writable(folder)
    first = None
    for name, path in files.items():
        try:
            read_document(path, name)
        except DataError as error:
            first = first or error
        else:
            return
    raise _none_readable(len(files), str(first))


def _none_readable(count: int, reason: str) -> DataError:
    """Returns the error that no document can be read; `reason` is that of the first one."""
    return DataError(reason if count == 1 else f"none of {count} documents can be read: {reason}")


def document_files(root: Path) -> tuple[dict[str, Path], int]:
    """Returns the documents by name, and the number of files of other kinds.

    Raises:
        SourceError: `root` does not exist, or contains no document.
    """
    if root.is_file():
        if root.suffix.lower() not in KINDS:
            raise SourceError(f"{root} is of no kind that is read; give {', '.join(KINDS)}")
        return {root.name: root}, 0
    if not root.is_dir():
        raise SourceError(f"folder {str(root)!r} does not exist; give a folder or a document")
    paths = [p for p in sorted(root.rglob("*")) if p.is_file() and not _hidden(p, root)]
    files = {p.relative_to(root).as_posix(): p for p in paths if p.suffix.lower() in KINDS}
    if not files:
        raise SourceError(
            f"folder {str(root)!r} contains no document; expected files ending in "
            f"{', '.join(KINDS)}"
        )
    return files, len(paths) - len(files)


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _earlier(folder: Path, root: Path, config: ChunkConfig | None) -> IndexState | None:
    """Returns the state of the index to continue; None if there is none yet.

    Raises:
        ConfigError: the existing index is of other documents, or of chunks of another size.
        CheckpointError: it is damaged.
    """
    if not (folder / INDEX_FILE).is_file():
        return None
    state = read_state(folder)
    if state.root != str(root.absolute()):
        raise ConfigError(
            f"the index {str(folder)!r} was built from {state.root!r}, got "
            f"{str(root.absolute())!r}; choose another folder for the new index"
        )
    if config is not None and config.model_dump() != state.chunking:
        raise ConfigError(
            f"the index {str(folder)!r} has chunks of {state.chunking['max_tokens']} tokens, got "
            f"{config.max_tokens}; leave the size out, or choose another folder"
        )
    return state


def _to_embed(
    files: dict[str, Path], state: IndexState, report: BuildReport, progress: Progress
) -> Iterator[Document]:
    """Yields the documents that are new or changed, and counts the others."""
    for name, path in files.items():
        progress.advance()
        known = state.documents.get(name)
        try:
            document = read_document(path, name)
        except DataError as error:
            report.refused[name] = str(error)
            if state.documents.pop(name, None) is not None:
                report.removed += 1
            continue
        if known is None:
            report.added += 1
        elif known["sha256"] == document.sha256:
            report.unchanged += 1
            continue
        else:
            report.changed += 1
        yield document


def add_documents(
    documents: Iterable[Document], folder: Path, embedder: Embedder, state: IndexState
) -> None:
    """Embeds documents and adds them to an index, one segment per group of documents."""
    config = ChunkConfig(**state.chunking)
    group, chunks = list[Document](), list[list[StoredChunk]]()
    for document in documents:
        group.append(document)
        chunks.append(_chunks(document, embedder.offsets, config))
        if sum(map(len, chunks)) >= GROUP_CHUNKS:
            _add_group(group, chunks, folder, embedder, state)
            group, chunks = [], []
    if group:
        _add_group(group, chunks, folder, embedder, state)


def _chunks(
    document: Document,
    offsets: Callable[[str], list[tuple[int, int]]],
    config: ChunkConfig,
) -> list[StoredChunk]:
    found = split_document(document.text, offsets, config, is_markdown=document.is_markdown)
    starts = np.asarray(document.page_starts)
    return [
        StoredChunk(
            row=0,
            document=document.name,
            start=chunk.start,
            end=chunk.end,
            text=document.text[chunk.start : chunk.end],
            headings=chunk.headings,
            page=int(np.searchsorted(starts, chunk.start, side="right")) if len(starts) else None,
        )
        for chunk in found
    ]


def _add_group(
    group: Sequence[Document],
    chunks: Sequence[Sequence[StoredChunk]],
    folder: Path,
    embedder: Embedder,
    state: IndexState,
) -> None:
    """Writes a segment with the chunks of some documents, then the state that names it."""
    flat = [chunk for each in chunks for chunk in each]
    name = uuid.uuid4().hex[:12]
    write_segment(folder, name, flat, embedder.embed([chunk.titled for chunk in flat]))
    state.segments[name] = len(flat)
    first = 0
    for document, each in zip(group, chunks, strict=True):
        state.documents[document.name] = {
            "sha256": document.sha256,
            "segment": name,
            "first": first,
            "count": len(each),
        }
        first += len(each)
    state.save(folder)


def compact(folder: Path, state: IndexState) -> bool:
    """Rewrites the live chunks as one segment if there are many segments or dead chunks.

    Returns:
        Whether the index was rewritten.
    """
    stored = sum(state.segments.values())
    live = sum(document["count"] for document in state.documents.values())
    if len(state.segments) <= MAX_SEGMENTS and stored - live <= MAX_DEAD * stored:
        return False
    index = Index(folder)
    name, chunks, vectors = uuid.uuid4().hex[:12], list[StoredChunk](), list[Vectors]()
    first_of = dict(zip(state.segments, (s.first for s in index.segments), strict=True))
    for document in state.documents.values():
        begin = first_of[document["segment"]] + document["first"]
        document["segment"], document["first"] = name, len(chunks)
        for row in range(begin, begin + document["count"]):
            chunks.append(replace(index.chunk(row), row=0))
            vectors.append(index.vector(row))
    if chunks:
        write_segment(folder, name, chunks, np.asarray(vectors, np.float32))
    state.segments = {name: len(chunks)} if chunks else {}
    state.save(folder)
    _remove_unnamed(folder, state)
    return True


def _remove_unnamed(folder: Path, state: IndexState) -> None:
    """Removes segments that the state does not name: remains of interrupted builds."""
    segments = folder / SEGMENTS
    for path in segments.iterdir() if segments.is_dir() else ():
        if path.name not in state.segments:
            shutil.rmtree(path, ignore_errors=True)


__all__ = [
    "BuildReport",
    "add_documents",
    "build_index",
    "check_build",
    "compact",
    "document_files",
]
