"""Attention without a softmax over pairs, so that its cost grows with the length and not with its square.

With features φ(q), φ(k) ≥ 0 (Katharopoulos et al. 2020, arXiv 2006.16236, eqs. 5 and 12):

    out_i = φ(q_i)ᵀ S_i / (φ(q_i)·z_i),     S_i = Σ_{j≤i} φ(k_j) v_jᵀ,     z_i = Σ_{j≤i} φ(k_j)

With two separate softmaxes (Shen et al. 2018, arXiv 1812.01243) each feature has a normaliser of its own:

    out_i = Σ_f softmax(q_i)_f S_i[f] / z_i[f],     φ(k) = e^k

`quadratic` writes the [T, T] weights out, `cumulative` works in chunks, `recurrent` a token at a time with constant state
(S: [f, d], z: [f] a head); all three are equal. Shapes: T tokens, H heads, f features, d value width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-6
"""Added to a normaliser, so that a query whose features vanish gives 0 and not NaN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureMap:
    """A kind of linear attention.

    Attributes:
        query, key: [T, H, d] → [T, H, f] features.
        normaliser: `pair` divides by φ(q)·z, `feature` divides each feature by its own z.
    """

    query: Callable[[Tensor], Tensor]
    key: Callable[[Tensor], Tensor]
    normaliser: Literal["pair", "feature"] = "pair"


@dataclass(slots=True)
class LinearState:
    """What a linear-attention layer remembers of a sequence, constant in its length: fp32
    outer [H, f, d] = Σ φ(k) vᵀ and total [H, f] = Σ φ(k)."""

    outer: Tensor
    total: Tensor


def elu_features(x: Tensor) -> Tensor:
    """elu(x) + 1 (arXiv 2006.16236, eq. 7): positive, d features."""
    return F.elu(x) + 1


def cosine_features(x: Tensor) -> Tensor:
    """(1, x/‖x‖), so that φ(q)·φ(k) = 1 + cos(q, k) ≥ 0: d + 1 features."""
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
    """Queries and keys of some tokens as features, and the values.

    Attributes:
        q, k: [T, H, f], what the normaliser is made of; v: [T, H, d].
        turned_q, turned_k: the same, rotated by their positions, what the numerator is made of (RoPE may make
            products negative, so the normaliser stays unrotated: arXiv 2104.09864, eq. 19).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    turned_q: Tensor
    turned_k: Tensor

    @classmethod
    def plain(cls, q: Tensor, k: Tensor, v: Tensor) -> "Features":
        """Without rotation."""
        return cls(q=q, k=k, v=v, turned_q=q, turned_k=k)


def quadratic(x: Features, kind: FeatureMap, *, causal: bool) -> Tensor:
    """[T, H, d] by way of the weights: the oracle."""
    return torch.einsum("hij,jhd->ihd", weights(x, kind, causal=causal), x.v)


def weights(x: Features, kind: FeatureMap, *, causal: bool) -> Tensor:
    """[H, T, T]: what linear attention gives each pair; rows of unrotated kinds sum to 1."""
    total = x.k.cumsum(0) if causal else x.k.sum(0, keepdim=True).expand_as(x.k)
    pairs = torch.einsum("ihf,jhf->hij", _scaled_queries(x, kind, total), x.turned_k)
    return pairs.tril() if causal else pairs


def cumulative(
    x: Features, kind: FeatureMap, state: LinearState | None = None, *, chunk: int = 64
) -> tuple[Tensor, LinearState]:
    """Causal, in chunks: inside a chunk as pairs, between chunks through the state.

    Returns:
        [T, H, d], and the state behind the last token.
    """
    state = state or _empty(x)
    total = state.total + x.k.cumsum(0)  # [T, H, f]
    queries = _scaled_queries(x, kind, total)
    outer, pieces = state.outer, []
    for q, k, v in zip(
        queries.split(chunk), x.turned_k.split(chunk), x.v.split(chunk), strict=True
    ):
        pairs = torch.einsum("ihf,jhf->hij", q, k).tril()
        inside = torch.einsum("hij,jhd->ihd", pairs, v)
        pieces.append(inside + torch.einsum("ihf,hfd->ihd", q, outer))
        outer = outer + torch.einsum("jhf,jhd->hfd", k, v)
    return torch.cat(pieces), LinearState(outer, total[-1])


def recurrent(
    x: Features, kind: FeatureMap, state: LinearState | None = None
) -> tuple[Tensor, LinearState]:
    """Causal, a token at a time: S ← S + φ(k) vᵀ, z ← z + φ(k)."""
    state = state or _empty(x)
    outer, total, rows = state.outer, state.total, []
    for t in range(len(x.q)):
        outer = outer + x.turned_k[t, :, :, None] * x.v[t, :, None, :]
        total = total + x.k[t]
        one = Features(
            q=x.q[t : t + 1],
            k=x.k[t : t + 1],
            v=x.v[t : t + 1],
            turned_q=x.turned_q[t : t + 1],
            turned_k=x.turned_k[t : t + 1],
        )
        query = _scaled_queries(one, kind, total[None])
        rows.append(torch.einsum("ihf,hfd->ihd", query, outer))
    return torch.cat(rows), LinearState(outer, total)


def bidirectional(x: Features, kind: FeatureMap) -> Tensor:
    """Every query sees every key, at linear cost: [T, H, d]."""
    outer = torch.einsum("jhf,jhd->hfd", x.turned_k, x.v)
    total = x.k.sum(0, keepdim=True).expand_as(x.k)
    return torch.einsum("ihf,hfd->ihd", _scaled_queries(x, kind, total), outer)


def _scaled_queries(x: Features, kind: FeatureMap, total: Tensor) -> Tensor:
    """Query features divided by their normaliser, so that what is left is a plain product with the keys."""
    if kind.normaliser == "feature":
        return x.turned_q / (total + EPS * (total == 0))
    return x.turned_q / ((x.q * total).sum(-1, keepdim=True) + EPS)


def _empty(x: Features) -> LinearState:
    heads, features = x.q.shape[1:]
    return LinearState(
        x.q.new_zeros(heads, features, x.v.shape[-1]), x.q.new_zeros(heads, features)
    )
