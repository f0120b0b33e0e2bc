"""Reciprocal rank fusion of several rankings.

    score(d) = Σ_r  w_r / (10 + rank_r(d))        ranks from 1; a missing document adds 0

Cormack, Clarke and Büttcher 2009 (SIGIR, "Reciprocal rank fusion outperforms Condorcet and
individual rank learning methods") use 60, for dozens of rankings of a thousand documents each. With
two rankings of a hundred, 60 makes the first and the tenth rank nearly equal: a document that is
tenth in both comes before one that is first in one of them and missing in the other. 10 found more
in both languages of XQuAD, on either half of its questions (docs/decisions.md).
"""

from collections.abc import Hashable, Sequence
from typing import TypeVar

T = TypeVar("T", bound=Hashable)
RANK_CONSTANT = 10


def fuse(
    rankings: Sequence[Sequence[T]], weights: Sequence[float] | None = None
) -> list[tuple[T, float]]:
    """Returns the items of all rankings with their fused scores, best first.

    Of equal scores, the item that is first in the first ranking comes first.

    >>> [item for item, _ in fuse([["a", "b", "c"], ["b", "a"]], [1.0, 2.0])]
    ['b', 'a', 'c']
    """
    scores: dict[T, float] = {}
    for ranking, weight in zip(rankings, weights or [1.0] * len(rankings), strict=True):
        for rank, item in enumerate(ranking, start=1):
            scores[item] = scores.get(item, 0.0) + weight / (RANK_CONSTANT + rank)
    return sorted(scores.items(), key=lambda pair: -pair[1])


__all__ = ["RANK_CONSTANT", "fuse"]
