"""Deduplication steps over splits: hash each split, make one global decision, filter each split."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from easyllm.corpus.dedup.clusters import Clusters
from easyllm.corpus.dedup.config import DedupStep, ExactConfig, MinHashConfig, ParagraphConfig
from easyllm.corpus.dedup.exact import (
    exact_duplicates,
    exact_keys,
    paragraph_keys,
    repeated,
    without_paragraphs,
)
from easyllm.corpus.dedup.minhash import Signatures, near_duplicates, signatures
from easyllm.corpus.dedup.ragged import Ragged
from easyllm.corpus.dedup.substring import repeated_words, without_words, word_hashes
from easyllm.corpus.document import Document, Rejection

Verdicts = Any
"""An open `.npz` file of one split: `kept` and `jaccard` per document, or `marks` (whether each
part is removed) and `offsets` (of each document's parts)."""


def save_keys(folder: Path, texts: Iterable[str], step: DedupStep) -> None:
    """Writes the hashes of a split's texts that `decide` needs into a new folder."""
    if isinstance(step, MinHashConfig):
        signatures(texts, step).save(folder)
        return
    folder.mkdir(parents=True)
    if isinstance(step, ExactConfig):
        np.save(folder / "keys.npy", exact_keys(texts, step))
        return
    ragged = (
        paragraph_keys(texts, step) if isinstance(step, ParagraphConfig) else word_hashes(texts)
    )
    np.save(folder / "keys.npy", ragged.values)
    np.save(folder / "offsets.npy", ragged.offsets)


def decide(
    folders: Sequence[Path], step: DedupStep
) -> tuple[list[dict[str, NDArray[Any]]], Clusters | None]:
    """Decides what to remove from each split.

    Args:
        folders: the folders that `save_keys` wrote, in the order of the splits.
        step: the deduplication step.

    Returns:
        The verdicts of each split (see `Verdicts`), and the clusters if the step removes complete
        documents, else None.
    """
    if isinstance(step, MinHashConfig):
        splits = [Signatures.load(folder) for folder in folders]
        return _whole(near_duplicates(splits, step), [len(split) for split in splits])
    keys = [np.load(folder / "keys.npy", allow_pickle=False) for folder in folders]
    if isinstance(step, ExactConfig):
        return _whole(exact_duplicates(np.concatenate(keys)), [len(part) for part in keys])
    parts = [
        Ragged(values, np.load(folder / "offsets.npy", allow_pickle=False))
        for values, folder in zip(keys, folders, strict=True)
    ]
    if isinstance(step, ParagraphConfig):
        marks = repeated(np.concatenate(keys))
    else:
        marks = repeated_words(Ragged.concatenate(parts), step)
    ends = np.cumsum([len(part.values) for part in parts])[:-1]
    return [
        {"marks": mine, "offsets": part.offsets}
        for mine, part in zip(np.split(marks, ends), parts, strict=True)
    ], None


def apply_verdict(
    document: Document, number: int, verdicts: Verdicts, step: DedupStep
) -> tuple[Document | Rejection, int]:
    """Applies the decision to a document.

    Args:
        document: the document.
        number: its index in the split.
        verdicts: the verdicts of the split.
        step: the deduplication step.

    Returns:
        The document without its removed parts, or its rejection; and the number of removed parts.
    """
    if isinstance(step, ExactConfig | MinHashConfig):
        if verdicts["kept"][number]:
            return document, 0
        value = float(verdicts["jaccard"][number])
        return Rejection(document=document, rule=step.kind, value=value), 0
    begin, end = verdicts["offsets"][number : number + 2]
    drop = verdicts["marks"][begin:end]
    parts = int(drop.sum())
    if isinstance(step, ParagraphConfig):
        text = without_paragraphs(document.text, drop, step)
    else:
        text = without_words(document.text, drop)
    if parts and not text.strip():
        return Rejection(document=document, rule=step.kind, value=parts), parts
    return replace(document, text=text), parts


def _whole(
    clusters: Clusters, counts: Sequence[int]
) -> tuple[list[dict[str, NDArray[Any]]], Clusters]:
    ends = np.cumsum(counts)[:-1]
    pairs = zip(np.split(clusters.is_kept, ends), np.split(clusters.jaccard, ends), strict=True)
    return [{"kept": kept, "jaccard": jaccard} for kept, jaccard in pairs], clusters
