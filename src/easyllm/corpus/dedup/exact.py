"""Exact deduplication: documents with equal texts, and paragraphs that occurred before."""

import unicodedata
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from easyllm.corpus.dedup.clusters import Clusters
from easyllm.corpus.dedup.config import ExactConfig, ParagraphConfig
from easyllm.corpus.dedup.ragged import U64, Ragged
from easyllm.corpus.dedup.words import digest, words

# ---- documents


def exact_keys(texts: Iterable[str], config: ExactConfig) -> U64:
    """Returns [n, 2] uint64, the 128-bit hash of each text, normalised if configured."""
    found = [digest(_normalize(text) if config.normalize else text, 16) for text in texts]
    low = (1 << 64) - 1
    return np.array([(key >> 64, key & low) for key in found], dtype=np.uint64).reshape(-1, 2)


def exact_duplicates(keys: U64) -> Clusters:
    """Returns the clusters of documents with equal keys; the first document is the representative.

    Args:
        keys: [n, 2] `exact_keys` of all documents, in order.
    """
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal keys remain in document order
    ordered = keys[order]
    is_first = np.ones(len(keys), bool)
    is_first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = order[is_first]
    representatives = np.empty(len(keys), np.int64)
    representatives[order] = first[np.cumsum(is_first) - 1]
    return Clusters(representatives=representatives, jaccard=np.ones(len(keys)))


# ---- paragraphs


def paragraphs(text: str, config: ParagraphConfig) -> list[str]:
    """Returns the paragraphs (or lines) that are not blank."""
    lines = text.split("\n")
    if config.unit == "line":
        return [line for line in lines if line.strip()]
    found: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return ["\n".join(part) for part in found if part]


def paragraph_keys(texts: Iterable[str], config: ParagraphConfig) -> Ragged:
    """Returns, for each text, the 64-bit hash of each paragraph; 0 if it is too short to remove."""
    rows = []
    for text in texts:
        parts = paragraphs(text, config)
        keys = [
            digest(_normalize(part), 8) if len(words(part)) >= config.min_words else 0
            for part in parts
        ]
        rows.append(np.array(keys, dtype=np.uint64))
    return Ragged.from_rows(rows)


def repeated(keys: U64) -> NDArray[np.bool_]:
    """Returns [N] bool: whether the key is not 0 and an equal key precedes it."""
    _, first = np.unique(keys, return_index=True)
    is_repeated: NDArray[np.bool_] = keys != 0
    is_repeated[first] = False
    return is_repeated


def without_paragraphs(text: str, drop: NDArray[np.bool_], config: ParagraphConfig) -> str:
    """Returns the text without the marked paragraphs; unchanged if none is marked.

    Args:
        text: the text.
        drop: [number of paragraphs] whether each is removed.
        config: how the text is split into paragraphs.
    """
    if not drop.any():
        return text
    parts = paragraphs(text, config)
    separator = "\n" if config.unit == "line" else "\n\n"
    return separator.join(part for part, gone in zip(parts, drop, strict=True) if not gone)


def _normalize(text: str) -> str:
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.casefold().split())
