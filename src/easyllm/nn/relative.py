"""Position encodings whose scores have further terms of content and relative position.

Transformer-XL and DeBERTa; that of Shaw et al. is in `nn/position`. Keys are stored as they are,
and the terms are computed from the positions of queries and keys in each pass.
"""

import torch
from torch import Tensor, nn

from easyllm.nn.cost import FP32, INT64, CostTrace, Scores
from easyllm.nn.position_config import DebertaRelative, TransformerXL
from easyllm.nn.rotary import NoRotation
from easyllm.ops.attention_rule import ScoreTerms


class RelativeScores(NoRotation):
    """Base class: scores with terms of vectors that belong to relative positions."""

    materializes_scores = learns_from_queries = True
    num_terms: int
    """Products of queries or keys with vectors of relative positions."""

    def keep_scores(self, trace: CostTrace, scores: Scores) -> None:
        """Records the rows of the vectors of all pairs, which are gathered for each term."""
        trace.keep("rows of vectors", self.num_terms * trace.work.pairs * INT64)
        if scores.q.grad or scores.k.grad or trace.work.trains_all:
            trace.keep("terms", scores.heads * trace.work.pairs * FP32)

    def score_products(self, trace: CostTrace, scores: Scores) -> None:
        """Records the products of each term."""
        for _ in range(self.num_terms):
            grads = (scores.q.grad or scores.k.grad) + trace.work.trains_all
            trace.product("scores", scores.flops, scores.flops * grads)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialises matrices and vectors from N(0, 0.02²)."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02, generator=generator)


class TransformerXLPosition(RelativeScores):
    """Transformer-XL's four terms (Dai et al. 2019, arXiv 1901.02860, section 3.3).

    e_ij = q_i·k_j + q_i·W r_{i-j} + u·k_j + v·W r_{i-j}

    r_t is the sinusoidal vector of the distance t; u and v are learned for each head.
    """

    num_terms = 1

    def __init__(self, config: TransformerXL, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.config, self.num_heads, self.head_dim = config, num_heads, head_dim
        self.width = num_heads * head_dim
        self.distance_proj = nn.Parameter(torch.empty(self.width, self.width))
        self.content_bias = nn.Parameter(torch.empty(num_heads, head_dim))
        self.distance_bias = nn.Parameter(torch.empty(num_heads, head_dim))
        self.terms = ScoreTerms(scores=self.scores)

    def scores(self, q: Tensor, k: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Returns the unscaled scores [H, Tq, Tk] for `q: [H, Tq, d]`, `k: [H, Tk, d]`."""
        u, v = (bias.to(q.dtype)[:, None] for bias in (self.content_bias, self.distance_bias))
        first, last = int(query.min() - key.max()), int(query.max() - key.min())
        distances = torch.arange(first, last + 1, device=q.device)
        vectors = self._sinusoids(distances).to(q.dtype) @ self.distance_proj.to(q.dtype).T
        vectors = vectors.view(-1, self.num_heads, self.head_dim).transpose(0, 1)  # [H, n, d]
        by_distance = (q + v) @ vectors.mT  # [H, Tq, n]
        rows = (query[:, None] - key[None, :] - first).expand(len(q), -1, -1)
        return (q + u) @ k.mT + by_distance.gather(-1, rows)

    def _sinusoids(self, distances: Tensor) -> Tensor:
        """Returns the vectors of `distances: [n]`, all sines and then all cosines, [n, W] fp64."""
        half = torch.arange(0, self.width, 2, device=distances.device).double() / self.width
        angles = distances.double()[:, None] / self.config.base**half
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class DebertaPosition(RelativeScores):
    """DeBERTa's disentangled attention (He et al. 2020, arXiv 2006.03654, eq. 4).

    e_ij = (q_i·k_j + q_i·K_δ(i,j) + k_j·Q_δ(j,i)) / √3        K = P W_K,  Q = P W_Q

    δ(i,j) is the distance i - j clipped to -m .. m - 1, plus m; P is a table of 2m vectors. The
    √3 is there because three terms are summed: with the usual scale, 1/√(3d) in all.
    """

    num_terms = 2

    def __init__(self, config: DebertaRelative, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.config, self.num_heads, self.head_dim = config, num_heads, head_dim
        width = num_heads * head_dim
        self.distances = nn.Parameter(torch.empty(2 * config.max_distance, width))
        self.key_proj = nn.Parameter(torch.empty(width, width))
        self.query_proj = nn.Parameter(torch.empty(width, width))
        self.terms = ScoreTerms(scores=self.scores)

    def scores(self, q: Tensor, k: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Returns the unscaled scores [H, Tq, Tk] for `q: [H, Tq, d]`, `k: [H, Tk, d]`."""
        keys, queries = (self._of_heads(w, q.dtype) for w in (self.key_proj, self.query_proj))
        ahead = self._rows(query[:, None] - key[None, :]).expand(len(q), -1, -1)
        back = self._rows(key[:, None] - query[None, :]).expand(len(q), -1, -1)
        to_position = (q @ keys.mT).gather(-1, ahead)  # [H, Tq, 2m] -> [H, Tq, Tk]
        from_position = (k @ queries.mT).gather(-1, back)  # [H, Tk, 2m] -> [H, Tk, Tq]
        return (q @ k.mT + to_position + from_position.mT) / 3**0.5

    def _of_heads(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the projected vectors of all distances, [H, 2m, d]."""
        vectors = self.distances.to(dtype) @ weight.to(dtype).T
        return vectors.view(-1, self.num_heads, self.head_dim).transpose(0, 1)

    def _rows(self, distance: Tensor) -> Tensor:
        most = self.config.max_distance
        return distance.clamp(-most, most - 1) + most


__all__ = ["DebertaPosition", "RelativeScores", "TransformerXLPosition"]
