"""Retrieval metrics with bootstrap intervals, for questions with one relevant document each.

recall@k = share of questions with rank ≤ k        MRR@k = mean of 1 / rank, 0 beyond k
nDCG@k   = mean of 1 / log₂(1 + rank), 0 beyond k  (Järvelin and Kekäläinen 2002, one relevant)
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
RESAMPLES = 1000
LEVEL = 0.95


def values_by_metric(ranks: Sequence[int | None]) -> dict[str, Array]:
    """Returns each question's value of each metric.

    Args:
        ranks: the rank of each question's relevant document, from 1; None if it was not found.
    """
    rank = np.asarray([np.inf if r is None else r for r in ranks], np.float64)
    near = rank <= 10
    return {
        "recall_at_1": (rank <= 1).astype(np.float64),
        "recall_at_5": (rank <= 5).astype(np.float64),
        "mrr_at_10": np.where(near, 1 / rank, 0.0),
        "ndcg_at_10": np.where(near, 1 / np.log2(1 + rank), 0.0),
    }


def mean_and_interval(values: Array, seed: int = 0) -> tuple[float, tuple[float, float]]:
    """Returns the mean of values [N], and its 95% interval by the percentile bootstrap.

    Efron and Tibshirani 1993 (An Introduction to the Bootstrap, chapter 13).

    Args:
        values: one value per question, at least one.
        seed: seed of the resamples.
    """
    generator = np.random.default_rng(seed)
    draws = generator.integers(len(values), size=(RESAMPLES, len(values)))
    means = values[draws].mean(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(values.mean()), (float(low), float(high))


__all__ = ["mean_and_interval", "values_by_metric"]
