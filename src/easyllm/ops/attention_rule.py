"""A layer's attention settings: scale, mask and how positions change the scores.

Shapes: Tq queries, Tk keys, H query heads, d head_dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

HeadDirection = Literal["forward", "backward", "both"]
"""Which keys a head sees: those up to the query, the query and later ones, or all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreTerms:
    """How a position encoding changes attention scores.

    `query` and `key` are positions, [Tq] and [Tk].

    Attributes:
        bias: (query, key) → [H, Tq, Tk], added to the scaled scores.
        scores: (q [H, Tq, d], k [H, Tk, d], query, key) → [H, Tq, Tk], unscaled; replaces q kᵀ.
        slopes: [H], if the bias is -slope · (query - key) for keys up to the query (ALiBi).
        values: (weights [H, Tq, Tk], query, key) → [H, Tq, d], added to the output.
    """

    bias: Callable[[Tensor, Tensor], Tensor] | None = None
    scores: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None
    values: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    slopes: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRule:
    """A layer's attention settings, independent of the batch.

    Attributes:
        scale: factor of the scores.
        causal: whether a query sees only keys up to its own position.
        window: sliding window; a query at position i sees keys at positions > i - window.
        num_sinks: number of first keys (attention sinks) that stay visible outside the window.
        softcap: scores become cap · tanh(score / cap).
        directions: the direction of each query head, where attention is bidirectional: everywhere
            if it is not causal, else within a prefix; None if all heads see both.
        terms: how the layer's position encoding changes the scores.
    """

    scale: float
    causal: bool = True
    window: int | None = None
    num_sinks: int = 0
    softcap: float | None = None
    directions: tuple[HeadDirection, ...] | None = None
    terms: ScoreTerms | None = None
