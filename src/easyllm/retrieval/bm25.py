"""BM25 over postings that are memory-mapped, one set per segment of an index.

    score(q, d) = Σ_t  ln(1 + (N - df + ½) / (df + ½)) · tf / (tf + k₁ (1 - b + b |d| / avg|d|))

Robertson and Zaragoza 2009 (The Probabilistic Relevance Framework, section 3), with Lucene's idf,
which is positive for every term, and without the factor k₁ + 1, which changes no ranking. It equals
`bm25s` (method `lucene`), and `rank-bm25` up to that factor where its idf is the same.

A term is stored as 64 bits of its BLAKE2b hash. Among a million terms, two share one with a
probability of 3e-8.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

K1, B = 1.5, 0.75
Array = np.ndarray[Any, Any]
FIELDS = ("hashes", "starts", "rows", "counts", "lengths")


@dataclass(frozen=True, slots=True)
class Postings:
    """In which texts each term occurs, and how often.

    Attributes:
        hashes: [V] uint64, ascending: the terms.
        starts: [V+1] int64: where the postings of each term begin.
        rows: [P] int32: texts, ascending within a term.
        counts: [P] int32: how often the term occurs in the text.
        lengths: [N] int32: number of terms of each text.
    """

    hashes: Array
    starts: Array
    rows: Array
    counts: Array
    lengths: Array

    @classmethod
    def build(cls, texts: Iterable[Sequence[str]]) -> "Postings":
        """Returns the postings of texts, given by their terms."""
        known: dict[str, int] = {}
        term_of, rows, counts, lengths = list[int](), list[int](), list[int](), list[int]()
        for row, words in enumerate(texts):
            lengths.append(len(words))
            for word, count in Counter(words).items():
                term_of.append(known.setdefault(word, len(known)))
                rows.append(row)
                counts.append(count)
        hashes = np.fromiter(map(term_hash, known), np.uint64, len(known))
        order = np.argsort(hashes, kind="stable")
        rank = np.empty(len(known), np.int64)
        rank[order] = np.arange(len(known))
        ranks = rank[np.asarray(term_of, np.int64)] if known else np.zeros(0, np.int64)
        by_term = np.argsort(ranks, kind="stable")  # rows stay ascending within a term
        starts = np.zeros(len(known) + 1, np.int64)
        np.cumsum(np.bincount(ranks, minlength=len(known)), out=starts[1:])
        return cls(
            hashes[order],
            starts,
            np.asarray(rows, np.int32)[by_term],
            np.asarray(counts, np.int32)[by_term],
            np.asarray(lengths, np.int32),
        )

    def of(self, term: int) -> tuple[Array, Array]:
        """Returns the rows with a term (given by its hash), and its counts there."""
        at = int(np.searchsorted(self.hashes, np.uint64(term)))
        if at == len(self.hashes) or int(self.hashes[at]) != term:
            return self.rows[:0], self.counts[:0]
        span = slice(int(self.starts[at]), int(self.starts[at + 1]))
        return self.rows[span], self.counts[span]

    def save(self, folder: Path) -> None:
        """Writes one file per array."""
        for name in FIELDS:
            np.save(folder / f"{name}.npy", getattr(self, name))

    @classmethod
    def load(cls, folder: Path) -> "Postings":
        """Maps the files of a folder into memory."""
        return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in FIELDS))


def term_hash(term: str) -> int:
    """Returns the 64 bits by which a term is stored."""
    return int.from_bytes(hashlib.blake2b(term.encode("utf-8"), digest_size=8).digest(), "little")


def bm25(
    segments: Sequence[Postings],
    live: Sequence[Array],
    query: Sequence[str],
    *,
    k1: float = K1,
    b: float = B,
) -> list[Array]:
    """Returns the scores of all texts, one array [N] fp32 per segment.

    Args:
        segments: the postings.
        live: [N] bool per segment: texts that exist; the others count nowhere and score 0.
        query: the terms of the question; a repeated term counts as often as it occurs.
        k1: saturation of term counts.
        b: strength of the normalisation by length, from 0 to 1.
    """
    total = sum(int(mask.sum()) for mask in live)
    words = sum(int(s.lengths[mask].sum()) for s, mask in zip(segments, live, strict=True))
    scores = [np.zeros(len(s.lengths), np.float32) for s in segments]
    if not total or not words:
        return scores
    mean = words / total
    norms = [k1 * (1 - b + b * s.lengths / mean) for s in segments]
    for term, repeats in Counter(query).items():
        found = [s.of(term_hash(term)) for s in segments]
        kept = [mask[rows] for (rows, _), mask in zip(found, live, strict=True)]
        frequency = sum(int(k.sum()) for k in kept)
        if not frequency:
            continue
        idf = np.log1p((total - frequency + 0.5) / (frequency + 0.5)) * repeats
        for score, norm, (rows, counts), keep in zip(scores, norms, found, kept, strict=True):
            at, tf = rows[keep], counts[keep]
            score[at] += (idf * tf / (tf + norm[at])).astype(np.float32)
    return scores


__all__ = ["K1", "B", "Postings", "bm25", "term_hash"]
