"""Linear attention as a mixer: constant-size state in decoding, cost linear in the length."""

import torch
from torch import Tensor, nn

from easyllm.nn.config import LinearAttentionConfig
from easyllm.nn.context import ForwardContext
from easyllm.nn.cost import FP32, Activation, CostTrace
from easyllm.nn.linear import Linear
from easyllm.nn.position import build_position
from easyllm.nn.rotary import RotaryPosition
from easyllm.ops.linear_attention import (
    FEATURE_MAPS,
    Features,
    LinearState,
    bidirectional,
    cumulative,
)

CHUNK = 64
"""Chunk size of causal linear attention, in tokens (`ops.linear_attention.cumulative`)."""


class LinearAttention(nn.Module):
    """Attention with feature maps instead of a softmax over pairs; heads are not grouped.

    See `ops/linear_attention`.

    Args:
        config: heads, features, positions.
        hidden_size: D.
        layer: the layer's number, under which the cache stores its state.
    """

    def __init__(self, config: LinearAttentionConfig, hidden_size: int, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        width = config.num_heads * config.head_dim
        self.q_proj = Linear(hidden_size, width, bias=config.qkv_bias)
        self.k_proj = Linear(hidden_size, width, bias=config.qkv_bias)
        self.v_proj = Linear(hidden_size, width, bias=config.qkv_bias)
        self.o_proj = Linear(width, hidden_size, bias=config.out_bias)
        self.position = build_position(
            config.position,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            causal=config.causal,
        )
        self.features = FEATURE_MAPS[config.features]

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """Returns the output [T, D] for `x: [T, D]`."""
        assert context.prefix_lengths is None, "linear attention has no prefix mask"
        heads = (x.shape[0], self.config.num_heads, self.config.head_dim)
        wide = torch.promote_types(x.dtype, torch.float32)
        q = self.features.query(self.q_proj(x, context).view(heads).to(wide))
        k = self.features.key(self.k_proj(x, context).view(heads).to(wide))
        v = self.v_proj(x, context).view(heads).to(wide)
        q, k, v = (context.to_sequences(y) for y in (q, k, v))
        inner = context.of_sequences
        inputs = (q, k, v, self.position.rotate(q, inner), self.position.rotate(k, inner))
        if context.store is not None:
            out = context.store.recur(self.layer, self._run, *inputs)
        else:
            pieces = zip(*(tensor.split(inner.lengths) for tensor in inputs), strict=True)
            out = torch.cat([self._run(*piece, state=None)[0] for piece in pieces])
        return self.o_proj(context.to_rows(out).to(x.dtype).reshape(x.shape[0], -1), context)

    def cost(self, trace: CostTrace, x: Activation) -> Activation:
        """Records the projections, the features in fp32 and the chunks of causal sequences.

        A chunk has the state that it passes to the next one, and the pairs inside it.
        """
        config, work = self.config, trace.work
        q = trace.linear(self.q_proj, "q_proj", x, part="attention")
        k = trace.linear(self.k_proj, "k_proj", x, part="attention")
        v = trace.linear(self.v_proj, "v_proj", x, part="attention")
        query = q.grad or k.grad  # a query is divided by a sum over keys
        state = k.grad or v.grad
        out = trace.made("mixed", config.num_heads * config.head_dim, grad=query or state)
        sequences = [chunks(n) if config.causal else [n] for n in work.lengths]
        if out.grad:
            self._keep_features(trace, sequences)
        for rows in sequences:
            self._sequence_products(trace, rows, q, k, v)
        return trace.linear(self.o_proj, "o_proj", out, part="attention")

    @property
    def _num_features(self) -> int:
        return self.config.head_dim + (self.config.features == "cosine")

    def _sequence_products(
        self, trace: CostTrace, rows_of: list[int], q: Activation, k: Activation, v: Activation
    ) -> None:
        config, features = self.config, self._num_features
        heads, dim = config.num_heads, config.head_dim
        query, state = q.grad or k.grad, k.grad or v.grad
        for number, rows in enumerate(rows_of):
            first = config.causal and number == 0
            last = config.causal and number == len(rows_of) - 1
            unit = 2 * heads * rows * features * dim
            trace.product("scores", unit, unit * (query + (state and not first)))  # q S
            trace.product("scores", unit, unit * (k.grad + v.grad) * (not last))  # k vᵀ, added to S
            if config.causal:
                full = trace.work.counting == "full"
                inside = 2 * heads * (rows * rows if full else rows * (rows + 1) // 2)
                trace.product("scores", inside * features, inside * features * (query + k.grad))
                trace.product("scores", inside * dim, inside * dim * (query + state))

    def _keep_features(self, trace: CostTrace, sequences: list[list[int]]) -> None:
        """Records the tensors saved in fp32.

        These are queries, keys, their features, normalisers and values; the pairs inside chunks and
        the states between chunks. The count is exact for causal attention; without a causal mask,
        and with cosine features, a few per cent less is saved.
        """
        config, features = self.config, self._num_features
        tokens, heads, dim = trace.work.tokens, config.num_heads, config.head_dim
        by_pair = config.features != "softmax"  # how the normaliser is formed
        copies = 5 + by_pair + isinstance(self.position, RotaryPosition)
        trace.keep("features", tokens * heads * (copies * features + dim + by_pair) * FP32)
        rows_of = [rows for chunks in sequences for rows in chunks]
        trace.keep("states", heads * len(rows_of) * features * dim * FP32)
        if config.causal:
            trace.keep("inside", heads * sum(rows * rows for rows in rows_of) * FP32)

    def cached_flops(self, _context: int) -> int:
        """Returns the FLOPs over cached keys and values: 0, since the state summarises them."""
        return 0

    def cache_elements(self) -> int:
        """Returns the number of cached elements per token: 0, since only the state is stored."""
        return 0

    def state_bytes(self) -> int:
        """Returns the bytes of a sequence's state, which is always fp32."""
        return self.config.num_heads * self._num_features * (self.config.head_dim + 1) * FP32

    def _run(self, *inputs: Tensor, state: LinearState | None) -> tuple[Tensor, LinearState | None]:
        """Runs one sequence's tokens, starting from the state before them."""
        q, k, v, rotated_q, rotated_k = inputs
        features = Features(q=q, k=k, v=v, rotated_q=rotated_q, rotated_k=rotated_k)
        if not self.config.causal:
            return bidirectional(features, self.features), None
        return cumulative(features, self.features, state)


def chunks(length: int) -> list[int]:
    """Returns the number of tokens of each chunk of a causal sequence."""
    return [min(CHUNK, length - start) for start in range(0, length, CHUNK)]
