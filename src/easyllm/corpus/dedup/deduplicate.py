"""Deduplicates documents in memory: all steps that a corpus build distributes over workers."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from easyllm.corpus.dedup.clusters import Clusters
from easyllm.corpus.dedup.config import (
    DedupConfig,
    ExactConfig,
    MinHashConfig,
    ParagraphConfig,
    SubstringConfig,
)
from easyllm.corpus.dedup.exact import (
    exact_duplicates,
    exact_keys,
    paragraph_keys,
    repeated,
    without_paragraphs,
)
from easyllm.corpus.dedup.minhash import near_duplicates, signatures
from easyllm.corpus.dedup.substring import repeated_words, without_words, word_hashes
from easyllm.corpus.document import Document, Rejection


@dataclass(frozen=True, slots=True, kw_only=True)
class Deduplication:
    """The result of deduplication.

    Attributes:
        documents: the kept documents, in order, without the removed parts.
        rejections: the removed documents: rule `exact` or `minhash` with the Jaccard similarity to
            the representative, or `paragraph` or `substring` with the number of removed parts if
            no text remained.
        clusters: the clusters of all input documents, by index.
        counts: number of removed documents, and of removed paragraphs or words, by rule.
    """

    documents: list[Document]
    rejections: list[Rejection]
    clusters: Clusters
    counts: Counter[str]


def deduplicate(documents: Iterable[Document], config: DedupConfig) -> Deduplication:
    """Applies the steps in order, each to the output of the step before it.

    >>> texts = ["The same.", "Another.", "the  same."]
    >>> found = deduplicate(
    ...     [Document(id=str(i), source="s", text=t) for i, t in enumerate(texts)], DedupConfig()
    ... )
    >>> [d.id for d in found.documents], list(found.clusters.removed())
    (['0', '1'], [(2, 0, 1.0)])
    """
    documents = list(documents)
    clusters = Clusters.alone(len(documents))
    numbers = np.arange(len(documents))  # indices of the documents not yet removed
    rejections: list[Rejection] = []
    counts: Counter[str] = Counter()
    for step in config.steps:
        texts = [document.text for document in documents]
        if isinstance(step, ParagraphConfig | SubstringConfig):
            cut, removed = _cut(texts, step)
            counts[f"{step.kind}_parts"] += sum(removed)
            is_kept = np.array(
                [bool(t.strip()) or not r for t, r in zip(cut, removed, strict=True)]
            )
            values: list[float] = [float(r) for r in removed]
            originals = documents
            documents = [replace(d, text=t) for d, t in zip(documents, cut, strict=True)]
        else:
            found = _find(texts, step)
            clusters = clusters.then(found, numbers)
            is_kept, values, originals = found.is_kept, found.jaccard.tolist(), documents
        gone = np.flatnonzero(~is_kept)
        rejections += [
            Rejection(document=originals[i], rule=step.kind, value=values[i]) for i in gone
        ]
        counts[step.kind] += len(gone)
        kept = np.flatnonzero(is_kept)
        documents, numbers = [documents[i] for i in kept], numbers[kept]
    return Deduplication(
        documents=documents, rejections=rejections, clusters=clusters, counts=counts
    )


def _find(texts: list[str], step: ExactConfig | MinHashConfig) -> Clusters:
    """Returns the clusters of duplicate documents."""
    if isinstance(step, ExactConfig):
        return exact_duplicates(exact_keys(texts, step))
    return near_duplicates([signatures(texts, step)], step)


def _cut(texts: list[str], step: ParagraphConfig | SubstringConfig) -> tuple[list[str], list[int]]:
    """Returns each text without its repeated parts, and the number of parts removed from it."""
    if isinstance(step, ParagraphConfig):
        parts = paragraph_keys(texts, step)
        drops = parts.split(repeated(parts.values))
        cut = [without_paragraphs(t, drop, step) for t, drop in zip(texts, drops, strict=True)]
    else:
        parts = word_hashes(texts)
        drops = parts.split(repeated_words(parts, step))
        cut = [without_words(text, drop) for text, drop in zip(texts, drops, strict=True)]
    return cut, [int(drop.sum()) for drop in drops]
