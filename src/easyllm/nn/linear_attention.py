"""Linear attention as a mixer: constant state in decoding, cost linear in the length."""

import torch
from torch import Tensor, nn

from easyllm.nn.config import LinearAttentionConfig
from easyllm.nn.context import ForwardContext
from easyllm.nn.linear import Linear
from easyllm.nn.position import build_position
from easyllm.ops.linear_attention import (
    FEATURE_MAPS,
    Features,
    LinearState,
    bidirectional,
    cumulative,
)


class LinearAttention(nn.Module):
    """Attention through features instead of a softmax over pairs (ops/linear_attention); heads are not grouped.

    Args:
        config: heads, features, positions.
        hidden_size: D.
        layer: the layer's number, under which the cache keeps its state.
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
        """`x: [T, D]` → [T, D]."""
        assert context.prefix_lengths is None, "linear attention has no prefix mask"
        heads = (x.shape[0], self.config.num_heads, self.config.head_dim)
        wide = torch.promote_types(x.dtype, torch.float32)
        q = self.features.query(self.q_proj(x, context).view(heads).to(wide))
        k = self.features.key(self.k_proj(x, context).view(heads).to(wide))
        v = self.v_proj(x, context).view(heads).to(wide)
        inputs = (q, k, v, self.position.rotate(q, context), self.position.rotate(k, context))
        if context.store is not None:
            out = context.store.recur(self.layer, self._run, *inputs)
        else:
            pieces = zip(*(tensor.split(context.lengths) for tensor in inputs), strict=True)
            out = torch.cat([self._run(*piece, state=None)[0] for piece in pieces])
        return self.o_proj(out.to(x.dtype).reshape(x.shape[0], -1), context)

    def _run(self, *inputs: Tensor, state: LinearState | None) -> tuple[Tensor, LinearState | None]:
        """One sequence's tokens from the state before them."""
        q, k, v, turned_q, turned_k = inputs
        features = Features(q=q, k=k, v=v, turned_q=turned_q, turned_k=turned_k)
        if not self.config.causal:
            return bidirectional(features, self.features), None
        return cumulative(features, self.features, state)
