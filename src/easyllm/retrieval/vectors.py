"""Exact nearest-neighbour search among memory-mapped fp16 vectors, in blocks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]
BLOCK_ROWS = 8192
"""Rows that are converted to fp32 at a time."""


def save_vectors(path: Path, vectors: Array) -> None:
    """Writes vectors [N, dim] as fp16."""
    np.save(path, vectors.astype(np.float16))


def load_vectors(path: Path) -> Array:
    """Maps vectors [N, dim] fp16 into memory; pages are read when they are searched."""
    found: Array = np.load(path, mmap_mode="c")  # torch refuses to share read-only memory
    return found


def similarities(vectors: Array, query: Array) -> Array:
    """Returns the dot products of all rows with a query, [N] fp32.

    Args:
        vectors: [N, dim] fp16.
        query: [dim] fp32.
    """
    rows, direction = torch.from_numpy(vectors), torch.from_numpy(query)
    out = torch.empty(len(rows))
    wide = torch.empty(min(BLOCK_ROWS, len(rows)), vectors.shape[1])
    for start in range(0, len(rows), BLOCK_ROWS):
        block = rows[start : start + BLOCK_ROWS]
        torch.mv(wide[: len(block)].copy_(block), direction, out=out[start : start + len(block)])
    found: Array = out.numpy()
    return found


def best(scores: Sequence[Array], live: Sequence[Array], k: int) -> list[tuple[int, float]]:
    """Returns the k best rows over all segments and their scores, best first.

    Rows are numbered across segments; of equal scores, the first row comes first.

    Args:
        scores: [N] fp32 per segment.
        live: [N] bool per segment: the rows that may be returned.
        k: how many; fewer if there are fewer rows.
    """
    if not scores:
        return []
    joined = np.concatenate([np.where(m, s, -np.inf) for s, m in zip(scores, live, strict=True)])
    k = min(k, int(sum(mask.sum() for mask in live)))
    if not k:
        return []
    border = np.partition(joined, len(joined) - k)[len(joined) - k]
    rows = np.flatnonzero(joined >= border)  # all that tie with the last one, too
    rows = rows[np.argsort(-joined[rows], kind="stable")][:k]
    return [(int(row), float(joined[row])) for row in rows]


__all__ = ["best", "load_vectors", "save_vectors", "similarities"]
