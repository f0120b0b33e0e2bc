"""Linear attention: no softmax over pairs, so its cost is linear in the sequence length.

With feature maps φ(q), φ(k) ≥ 0 (Katharopoulos et al. 2020, arXiv 2006.16236, eqs. 5 and 12):

    out_i = φ(q_i)ᵀ S_i / (φ(q_i)·z_i),     S_i = Σ_{j≤i} φ(k_j) v_jᵀ,     z_i = Σ_{j≤i} φ(k_j)

With two separate softmaxes (efficient attention, Shen et al. 2018, arXiv 1812.01243) each feature
has a separate normalizer:

    out_i = Σ_f softmax(q_i)_f S_i[f] / z_i[f],     φ(k) = e^k

`quadratic` materializes the [T, T] weights, `cumulative` works in chunks, and `recurrent` processes
one token at a time with a state of constant size (S: [f, d], z: [f] per head); all three compute
the same function. Shapes: T tokens, H heads, f features, d value width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-6
"""Added to a normalizer, so that a query whose features are all zero gives 0 instead of NaN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureMap:
    """A kind of linear attention: its feature maps and its normalizer.

    Attributes:
        query, key: feature maps [T, H, d] → [T, H, f].
        normaliser: `pair` divides by φ(q)·z, `feature` divides each feature by its own z.
    """

    query: Callable[[Tensor], Tensor]
    key: Callable[[Tensor], Tensor]
    normaliser: Literal["pair", "feature"] = "pair"


@dataclass(slots=True)
class LinearState:
    """Recurrent state of a linear-attention layer; its size is independent of the sequence length.

    Attributes:
        outer: [H, f, d] fp32, Σ φ(k) vᵀ.
        total: [H, f] fp32, Σ φ(k).
    """

    outer: Tensor
    total: Tensor


def elu_features(x: Tensor) -> Tensor:
    """Returns elu(x) + 1, d positive features (arXiv 2006.16236, eq. 7)."""
    return F.elu(x) + 1


def cosine_features(x: Tensor) -> Tensor:
    """Returns (1, x/‖x‖), d + 1 features, so that φ(q)·φ(k) = 1 + cos(q, k) ≥ 0."""
    return torch.cat([torch.ones_like(x[..., :1]), F.normalize(x, dim=-1)], dim=-1)


FEATURE_MAPS = {
    "elu": FeatureMap(query=elu_features, key=elu_features),
    "cosine": FeatureMap(query=cosine_features, key=cosine_features),
    "softmax": FeatureMap(
        query=lambda x: x.softmax(-1), key=lambda x: x.clamp(max=60).exp(), normaliser="feature"
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Features of the queries and keys of some tokens, and the values.

    Attributes:
        q, k: [T, H, f], used in the normalizer; v: [T, H, d].
        rotated_q, rotated_k: the same features rotated by position (RoPE), used in the numerator.
            RoPE can make dot products negative, so the normalizer uses the unrotated features
            (arXiv 2104.09864, eq. 19).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rotated_q: Tensor
    rotated_k: Tensor

    @classmethod
    def plain(cls, q: Tensor, k: Tensor, v: Tensor) -> "Features":
        """Builds features without rotation."""
        return cls(q=q, k=k, v=v, rotated_q=q, rotated_k=k)


def quadratic(x: Features, kind: FeatureMap, *, causal: bool) -> Tensor:
    """Returns attention [T, H, d] from explicit weights: the reference for the other forms."""
    return torch.einsum("hij,jhd->ihd", weights(x, kind, causal=causal), x.v)


def weights(x: Features, kind: FeatureMap, *, causal: bool) -> Tensor:
    """Returns the attention weights [H, T, T]; rows sum to 1 if the features are not rotated."""
    total = x.k.cumsum(0) if causal else x.k.sum(0, keepdim=True).expand_as(x.k)
    pairs = torch.einsum("ihf,jhf->hij", _scaled_queries(x, kind, total), x.rotated_k)
    return pairs.tril() if causal else pairs


def cumulative(
    x: Features, kind: FeatureMap, state: LinearState | None = None, *, chunk: int = 64
) -> tuple[Tensor, LinearState]:
    """Computes causal attention in chunks: pairwise within a chunk, through the state between them.

    Args:
        x: features and values of the new tokens.
        kind: feature maps and normalizer.
        state: state after the preceding tokens; None at the start of a sequence.
        chunk: tokens per chunk.

    Returns:
        [T, H, d], and the state after the last token.
    """
    state = state or _empty(x)
    total = state.total + x.k.cumsum(0)  # [T, H, f]
    queries = _scaled_queries(x, kind, total)
    outer, pieces = state.outer, []
    for q, k, v in zip(
        queries.split(chunk), x.rotated_k.split(chunk), x.v.split(chunk), strict=True
    ):
        pairs = torch.einsum("ihf,jhf->hij", q, k).tril()
        inside = torch.einsum("hij,jhd->ihd", pairs, v)
        pieces.append(inside + torch.einsum("ihf,hfd->ihd", q, outer))
        outer = outer + torch.einsum("jhf,jhd->hfd", k, v)
    return torch.cat(pieces), LinearState(outer, total[-1])


def recurrent(
    x: Features, kind: FeatureMap, state: LinearState | None = None
) -> tuple[Tensor, LinearState]:
    """Computes causal attention one token at a time: S ← S + φ(k) vᵀ, z ← z + φ(k).

    Args:
        x: features and values of the new tokens.
        kind: feature maps and normalizer.
        state: state after the preceding tokens; None at the start of a sequence.

    Returns:
        [T, H, d], and the state after the last token.
    """
    state = state or _empty(x)
    outer, total, rows = state.outer, state.total, []
    for t in range(len(x.q)):
        outer = outer + x.rotated_k[t, :, :, None] * x.v[t, :, None, :]
        total = total + x.k[t]
        one = Features(
            q=x.q[t : t + 1],
            k=x.k[t : t + 1],
            v=x.v[t : t + 1],
            rotated_q=x.rotated_q[t : t + 1],
            rotated_k=x.rotated_k[t : t + 1],
        )
        query = _scaled_queries(one, kind, total[None])
        rows.append(torch.einsum("ihf,hfd->ihd", query, outer))
    return torch.cat(rows), LinearState(outer, total)


def bidirectional(x: Features, kind: FeatureMap) -> Tensor:
    """Returns attention [T, H, d] in which every query sees every key, at linear cost."""
    outer = torch.einsum("jhf,jhd->hfd", x.rotated_k, x.v)
    total = x.k.sum(0, keepdim=True).expand_as(x.k)
    return torch.einsum("ihf,hfd->ihd", _scaled_queries(x, kind, total), outer)


def _scaled_queries(x: Features, kind: FeatureMap, total: Tensor) -> Tensor:
    """Returns query features over the normalizer; their dot products with keys are the weights."""
    if kind.normaliser == "feature":
        return x.rotated_q / (total + EPS * (total == 0))
    return x.rotated_q / ((x.q * total).sum(-1, keepdim=True) + EPS)


def _empty(x: Features) -> LinearState:
    heads, features = x.q.shape[1:]
    return LinearState(
        x.q.new_zeros(heads, features, x.v.shape[-1]), x.q.new_zeros(heads, features)
    )
