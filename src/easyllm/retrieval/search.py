"""Searching an index: by vectors, by terms, or by both, fused."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from easyllm.core.errors import ConfigError
from easyllm.embed.embedder import Embedder, Vectors, load_embedder
from easyllm.retrieval.fuse import fuse
from easyllm.retrieval.index import Index, StoredChunk

Mode = Literal["fused", "dense", "bm25"]
CANDIDATES = 50
"""Chunks of each ranking that are fused."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A chunk that was found.

    Attributes:
        chunk: the chunk.
        score: of the ranking: the fused score, cosine or BM25 score.
    """

    chunk: StoredChunk
    score: float


class Retriever:
    """Finds the chunks of an index that fit a question.

    Args:
        index: the index.
        embedder: the model that made its vectors.

    Raises:
        ConfigError: the index was built with another embedding model.
    """

    def __init__(self, index: Index, embedder: Embedder) -> None:
        index.check_embedder(embedder)
        self.index, self.embedder = index, embedder

    def search(
        self, question: str, k: int = 5, mode: Mode = "fused", *, vector: Vectors | None = None
    ) -> list[Hit]:
        """Returns the best chunks for a question, best first.

        Args:
            question: the question.
            k: how many.
            mode: `dense` ranks by vectors, `bm25` by terms, `fused` by both.
            vector: [dim], used in place of the question's vector (that of a hypothetical answer).

        Raises:
            ConfigError: the question is empty.
        """
        ranked = self.rank(question, k, mode, vector=vector)
        return [Hit(self.index.chunk(row), score) for row, score in ranked]

    def rank(
        self, question: str, k: int, mode: Mode = "fused", *, vector: Vectors | None = None
    ) -> list[tuple[int, float]]:
        """Returns the rows and scores of the best chunks; see `search`."""
        if not question.strip():
            raise ConfigError("the question is empty; give a text to search for")
        if mode == "bm25":
            return self.index.matching(question, k)
        if vector is None:
            vector = self.embedder.embed([question], "query")[0]
        if mode == "dense":
            return self.index.nearest(vector, k)
        wanted = max(k, CANDIDATES)
        dense, lexical = self.index.nearest(vector, wanted), self.index.matching(question, wanted)
        return fuse([[row for row, _ in dense], [row for row, _ in lexical]])[:k]


def open_retriever(folder: Path, embedder: str | None = None) -> Retriever:
    """Opens an index with its embedding model.

    Args:
        folder: the index.
        embedder: the embedding model; by default the one that the index names.

    Raises:
        SourceError: there is no index, or the model is not installed.
        ConfigError: the index was built with another model.
    """
    index = Index(folder)
    return Retriever(index, load_embedder(embedder or index.state.embedder["name"]))


__all__ = ["CANDIDATES", "Hit", "Mode", "Retriever", "open_retriever"]
