"""Evaluates retrieval: at which rank the document with the answer is found.

A document's rank is that of its best chunk among the documents. Without a document, a chunk is
relevant if it contains one of the answers (NFKC, in lower case).
"""

import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from easyllm.core.errors import DataError, suggest
from easyllm.core.json_types import JsonObject
from easyllm.core.progress import track
from easyllm.embed.embedder import Embedder, embed_with_progress
from easyllm.retrieval.build import add_documents
from easyllm.retrieval.chunk import ChunkConfig
from easyllm.retrieval.documents import Document
from easyllm.retrieval.index import Index, IndexState, describe_embedder
from easyllm.retrieval.metrics import mean_and_interval, values_by_metric
from easyllm.retrieval.question_files import Question
from easyllm.retrieval.search import Mode, Retriever

MODES: tuple[Mode, ...] = ("fused", "dense", "bm25")
DEPTH = 50
"""Chunks of a ranking in which the document is looked for."""


@dataclass(frozen=True, slots=True)
class RetrievalReport:
    """The figures of a retrieval evaluation.

    Attributes:
        ranks: for each ranking, the rank of each question's document; None beyond `DEPTH` chunks.
        num_documents: number of documents searched.
        embedder: name of the embedding model.
    """

    ranks: dict[Mode, list[int | None]]
    num_documents: int
    embedder: str

    def as_dict(self) -> JsonObject:
        """Returns the figures of the fused ranking, and those of the others under `rankings`."""
        figures = {mode: _figures(ranks) for mode, ranks in self.ranks.items()}
        return {
            **figures["fused"],
            "n": len(self.ranks["fused"]),
            "documents": self.num_documents,
            "embedder": self.embedder,
            "rankings": {mode: figures[mode] for mode in MODES if mode != "fused"},
        }


def _figures(ranks: Sequence[int | None]) -> JsonObject:
    found = {name: mean_and_interval(v) for name, v in values_by_metric(ranks).items()}
    means: JsonObject = {name: mean for name, (mean, _) in found.items()}
    return means | {"intervals": {name: list(interval) for name, (_, interval) in found.items()}}


@contextmanager
def paragraph_retriever(
    paragraphs: dict[str, str], embedder: Embedder, config: ChunkConfig | None = None
) -> Iterator[Retriever]:
    """Yields a retriever on paragraphs, which are indexed in a temporary folder.

    Args:
        paragraphs: texts by name.
        embedder: the embedding model.
        config: how paragraphs are split.
    """
    documents = (Document(name=n, text=t, sha256="") for n, t in paragraphs.items())
    shown = track(documents, "indexing", total=len(paragraphs), unit="paragraph")
    with tempfile.TemporaryDirectory() as folder:
        state = IndexState(
            embedder=describe_embedder(embedder),
            root="",
            chunking=(config or ChunkConfig()).model_dump(),
        )
        add_documents(shown, Path(folder), embedder, state)
        yield Retriever(Index(Path(folder)), embedder)


def evaluate_paragraphs(
    paragraphs: dict[str, str],
    questions: Sequence[Question],
    embedder: Embedder,
    config: ChunkConfig | None = None,
) -> RetrievalReport:
    """Indexes paragraphs and evaluates questions, whose `document` is a name of a paragraph."""
    with paragraph_retriever(paragraphs, embedder, config) as retriever:
        return evaluate_retrieval(retriever, questions)


def evaluate_retrieval(retriever: Retriever, questions: Sequence[Question]) -> RetrievalReport:
    """Evaluates questions on an index.

    Raises:
        DataError: a question names a document that the index does not contain.
    """
    names = retriever.index.state.documents
    for question in questions:
        if question.document is not None and question.document not in names:
            raise DataError(
                f"question {question.text!r} names the document {question.document!r}, which the "
                f"index does not contain{suggest(question.document, names)}; use a name of "
                "`documents` in its index.json"
            )
    vectors = embed_with_progress(retriever.embedder, [q.text for q in questions], "query")
    ranks: dict[Mode, list[int | None]] = {mode: [] for mode in MODES}
    for question, vector in zip(questions, vectors, strict=True):
        for mode in MODES:
            found = retriever.rank(question.text, DEPTH, mode, vector=np.asarray(vector))
            ranks[mode].append(_rank(retriever.index, [row for row, _ in found], question))
    return RetrievalReport(ranks, len(retriever.index.state.documents), retriever.embedder.name)


def _rank(index: Index, rows: Sequence[int], question: Question) -> int | None:
    """Returns the rank of the first relevant document, from 1."""
    seen = dict[str, None]()
    for row in rows:
        name = index.document_of(row)
        seen[name] = None
        if question.document is not None:
            relevant = name == question.document
        else:
            relevant = contains_any(index.chunk(row).text, question.answers)
        if relevant:
            return len(seen)
    return None


def contains_any(text: str, answers: Sequence[str]) -> bool:
    """Whether a text contains one of the answers, normalised (NFKC), in lower case."""
    found = _plain(text)
    return any(_plain(answer) in found for answer in answers if answer.strip())


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


__all__ = [
    "RetrievalReport",
    "contains_any",
    "evaluate_paragraphs",
    "evaluate_retrieval",
    "paragraph_retriever",
]
