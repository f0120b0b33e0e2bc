"""Position encodings: how the position of a token in its sequence enters the model.

Encodings that rotate queries and keys (RoPE) do so before the keys are stored. Encodings that
change scores (ALiBi, T5, Shaw, ReRoPE) pass score functions to attention; their keys are stored
unrotated. Encodings that add to the embedding are in `nn/embedding_position`.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from easyllm.nn.cost import FP32, INT64, CostTrace, Scores
from easyllm.nn.position_config import (
    Alibi,
    BlockRope,
    DebertaRelative,
    NoPosition,
    Position,
    ReRope,
    Rope,
    Shaw,
    StreamingRope,
    T5Bias,
    TransformerXL,
)
from easyllm.nn.relative import DebertaPosition, TransformerXLPosition
from easyllm.nn.rope_scaling import rope_frequencies
from easyllm.nn.rotary import BlockRotaryPosition, NoRotation, RotaryPosition
from easyllm.ops.attention_rule import ScoreTerms
from easyllm.ops.rotary import rotate_pairs


class AlibiPosition(NoRotation):
    """ALiBi: adds -slope_h · distance to the scores (arXiv 2108.12409, section 3)."""

    mask_per_head = True

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        with torch.device("cpu"):  # a model may be built on the meta device
            slopes = tuple(alibi_slopes(num_heads).tolist())
        self.terms = ScoreTerms(bias=self.bias, slopes=slopes)

    def bias(self, query: Tensor, key: Tensor) -> Tensor:
        """Returns the bias [H, Tq, Tk] for query positions [Tq] and key positions [Tk]."""
        distance = (query[:, None] - key[None, :]).abs()
        slopes = alibi_slopes(self.num_heads).to(query.device)
        return -slopes[:, None, None] * distance


def alibi_slopes(num_heads: int) -> Tensor:
    """Returns the slopes of ALiBi, [num_heads] fp32.

    They are 2^(-8i/n) for i = 1..n if n is a power of two. Otherwise they are the slopes of the
    next lower power of two, followed by every second slope of twice that power (authors' code).

    >>> alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    True
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    slopes += [2 ** (-4 * i / power) for i in range(1, 2 * (num_heads - power), 2)]
    return torch.tensor(slopes, dtype=torch.float32)


class T5Position(NoRotation):
    """T5 bias: adds a learned bias per distance bucket (arXiv 1910.10683, section 2.1)."""

    mask_per_head = trained_mask = True

    def __init__(self, config: T5Bias, num_heads: int, *, causal: bool) -> None:
        super().__init__()
        self.config, self.bidirectional = config, not causal
        self.bias_table: nn.Parameter | None = nn.Parameter(
            torch.empty(config.num_buckets, num_heads)
        )
        self._first: tuple[T5Position, ...] = ()  # not a submodule: the table has one name
        self.terms = ScoreTerms(bias=self.bias)

    def share(self, first: "T5Position") -> None:
        """Uses the table of another layer from now on."""
        self._first, self.bias_table = (first,), None

    @property
    def table(self) -> Tensor:
        """The biases, [num_buckets, num_heads]."""
        table = self._first[0].bias_table if self._first else self.bias_table
        assert table is not None, "the layer whose table is shared has it"
        return table

    def bias(self, query: Tensor, key: Tensor) -> Tensor:
        """Returns the bias [H, Tq, Tk] for query positions [Tq] and key positions [Tk]."""
        relative = key[None, :] - query[:, None]
        buckets = t5_buckets(
            relative,
            bidirectional=self.bidirectional,
            num_buckets=self.config.num_buckets,
            max_distance=self.config.max_distance,
        )
        return F.embedding(buckets, self.table).permute(2, 0, 1)

    def keep_scores(self, trace: CostTrace, scores: Scores) -> None:  # noqa: ARG002 - interface
        """Records the bucket of each pair."""
        trace.keep("buckets", trace.work.pairs * INT64)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialises the biases from N(0, 0.02²)."""
        if self.bias_table is not None:
            nn.init.normal_(self.bias_table, std=0.02, generator=generator)


def t5_buckets(
    relative: Tensor, *, bidirectional: bool, num_buckets: int = 32, max_distance: int = 128
) -> Tensor:
    """Returns the bucket of each relative position (key - query).

    Buckets are exact for small distances and logarithmic for larger ones; distances from
    `max_distance` on share the last bucket. With `bidirectional`, the upper half of the buckets is
    for keys after the query.
    """
    bucket = torch.zeros_like(relative)
    if bidirectional:
        num_buckets //= 2
        bucket = (relative > 0).long() * num_buckets
        distance = relative.abs()
    else:
        distance = (-relative).clamp(min=0)
    exact = num_buckets // 2
    far = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (far * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return bucket + torch.where(distance < exact, distance, far)


class ShawPosition(NoRotation):
    """Adds learned vectors for clipped distances to keys and values.

    e_ij = q_i·(k_j + a^K_{clip(j-i)}) · scale      out_i = Σ_j α_ij (v_j + a^V_{clip(j-i)})

    See arXiv 1803.02155, eqs. 3 and 4.
    """

    materializes_scores = learns_from_queries = True

    def __init__(self, config: Shaw, head_dim: int) -> None:
        super().__init__()
        self.config = config
        rows = 2 * config.max_distance + 1
        self.key_vectors = nn.Parameter(torch.empty(rows, head_dim))
        self.value_vectors = nn.Parameter(torch.empty(rows, head_dim)) if config.values else None
        self.terms = ScoreTerms(scores=self.scores, values=self.values if config.values else None)

    def scores(self, q: Tensor, k: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Returns the unscaled scores [H, Tq, Tk] for `q: [H, Tq, d]`, `k: [H, Tk, d]`."""
        vectors = self.key_vectors[self._rows(query, key)].to(q.dtype)  # [Tq, Tk, d]
        return q @ k.mT + torch.einsum("hqd,qkd->hqk", q, vectors)

    def values(self, weights: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Returns the contribution of the value vectors, [H, Tq, d], for `weights: [H, Tq, Tk]`."""
        assert self.value_vectors is not None
        vectors = self.value_vectors[self._rows(query, key)].to(weights.dtype)
        return torch.einsum("hqk,qkd->hqd", weights, vectors)

    def keep_scores(self, trace: CostTrace, scores: Scores) -> None:
        """Records the vectors of all pairs and, if they are trained, their row indices.

        The vectors are saved once for each matrix product that has a gradient.
        """
        q, k, values, pairs = scores.q, scores.k, self.config.values, trace.work.pairs
        tables = q.grad + (values and (q.grad or k.grad))
        trace.keep("vectors", tables * pairs * scores.dim * FP32)
        trace.keep("rows of vectors", trace.work.trains_all * (1 + values) * pairs * INT64)

    def score_products(self, trace: CostTrace, scores: Scores) -> None:
        """Records queries times key vectors, and weights times value vectors if there are any."""
        trained, flops, q = trace.work.trains_all, scores.flops, scores.q
        trace.product("scores", flops, flops * (q.grad + trained))
        if self.config.values:
            trace.product("scores", flops, flops * ((q.grad or scores.k.grad) + trained))

    def _rows(self, query: Tensor, key: Tensor) -> Tensor:
        limit = self.config.max_distance
        return (key[None, :] - query[:, None]).clamp(-limit, limit) + limit

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialises the vectors from N(0, 0.02²)."""
        for vectors in (self.key_vectors, self.value_vectors):
            if vectors is not None:
                nn.init.normal_(vectors, std=0.02, generator=generator)


class ReRopePosition(NoRotation):
    """ReRoPE: RoPE with rectified relative positions (Su 2023).

    The relative position is i - j within the window w. Beyond the window it is w, or with `leak` k
    it is w + (i - j - w) / k. Keys are stored unrotated.
    """

    materializes_scores = rotates_in_scores = True

    def __init__(self, config: ReRope, head_dim: int) -> None:
        super().__init__()
        self.config = config
        self.rope = Rope(theta=config.theta)
        self.head_dim = head_dim
        self.terms = ScoreTerms(scores=self.scores)

    def scores(self, q: Tensor, k: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Returns unscaled scores [H, Tq, Tk] for unrotated `q: [H, Tq, d]`, `k: [H, Tk, d]`."""
        if len(query) == 1:
            return self.decode_scores(q, k, query, key)
        return self.near_far_scores(q, k, query, key)

    def near_far_scores(self, q: Tensor, k: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Returns the scores, computed as one score matrix for near pairs and one for far pairs.

        Near pairs use ordinary rotation. Far pairs use compressed positions: a query at
        (i - w) / k + w and a key at j / k give w + (i - j - w) / k; without leak the query is at w
        and the key at 0.
        """
        window, leak = self.config.window, self.config.leak
        near = self._rotate(q, query.float()) @ self._rotate(k, key.float()).mT
        if leak is None:
            far = self._rotate(q, torch.full_like(query, window).float()) @ k.mT
        else:
            far_query = (query.float() - window) / leak + window
            far = self._rotate(q, far_query) @ self._rotate(k, key.float() / leak).mT
        return torch.where(query[:, None] - key[None, :] < window, near, far)

    def decode_scores(self, q: Tensor, k: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Returns the scores of a single query.

        Keys are rotated by minus their rectified distance, and the query is not rotated.
        """
        distance = (query - key).float()
        window, leak = self.config.window, self.config.leak
        far = (
            torch.full_like(distance, window)
            if leak is None
            else window + (distance - window) / leak
        )
        rectified = torch.where(distance < window, distance, far)
        return q @ self._rotate(k, -rectified).mT

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """`x: [H, T, d]` rotated by real-valued positions [T]."""
        frequencies, _ = rope_frequencies(self.rope, self.head_dim, 1)
        angles = positions[:, None] * frequencies.to(x.device)
        return rotate_pairs(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype))


class StreamingPosition(NoRotation):
    """RoPE for StreamingLLM, with positions inside the KV cache (arXiv 2309.17453).

    The cache contains the first s = `num_sinks` tokens (attention sinks) and the last w = `window`
    tokens. Once it is full, the newest token has the cache position s + w - 1, regardless of its
    position in the text. The distances between recent tokens are unchanged; the distance of the
    newest token from a sink at position j stays s + w - 1 - j.
    """

    materializes_scores = rotates_in_scores = True

    def __init__(
        self, config: StreamingRope, head_dim: int, *, window: int, num_sinks: int
    ) -> None:
        super().__init__()
        self.rope, self.head_dim = Rope(theta=config.theta), head_dim
        self.window, self.num_sinks = window, num_sinks
        self.terms = ScoreTerms(scores=self.scores)

    def scores(self, q: Tensor, k: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Returns unscaled scores [H, Tq, Tk] for unrotated `q: [H, Tq, d]`, `k: [H, Tk, d]`.

        Args:
            query, key: positions [Tq], [Tk] in the text.
        """
        base = query.min() - self.window  # only differences matter, and small angles are precise
        near = self._rotate(q, query - base) @ self._rotate(k, (key - base).clamp(min=0)).mT
        if not self.num_sinks:
            return near
        place = query.clamp(max=self.num_sinks + self.window - 1)
        sinks = self._rotate(q, place) @ self._rotate(k, key.clamp(max=self.num_sinks)).mT
        return torch.where(key < self.num_sinks, sinks, near)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        frequencies, _ = rope_frequencies(self.rope, self.head_dim, 1)
        angles = positions[:, None] * frequencies.to(x.device).double()
        return rotate_pairs(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype))


PositionModule = RotaryPosition | BlockRotaryPosition | NoRotation


def build_position(
    config: Position,
    *,
    num_heads: int,
    head_dim: int,
    causal: bool,
    window: int | None = None,
    num_sinks: int = 0,
) -> PositionModule:
    """Returns the position module for an attention layer's configuration."""
    match config:
        case StreamingRope():
            assert window is not None, "checked by the configuration"
            return StreamingPosition(config, head_dim, window=window, num_sinks=num_sinks)
        case Rope():
            return RotaryPosition(config, head_dim)
        case BlockRope():
            return BlockRotaryPosition(config, head_dim)
        case ReRope():
            return ReRopePosition(config, head_dim)
        case Alibi():
            return AlibiPosition(num_heads)
        case T5Bias():
            return T5Position(config, num_heads, causal=causal)
        case Shaw():
            return ShawPosition(config, head_dim)
        case TransformerXL():
            return TransformerXLPosition(config, num_heads, head_dim)
        case DebertaRelative():
            return DebertaPosition(config, num_heads, head_dim)
        case NoPosition():
            return NoRotation()
