"""Softmax attention: MHA, GQA and MQA by the number of key-value heads."""

from torch import Tensor, nn

from easyllm.nn.config import AttentionConfig
from easyllm.nn.linear import Linear
from easyllm.nn.position import build_position
from easyllm.ops.attention import AttentionContext, AttentionRule, attention


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245): H query heads share K key-value heads.

    Args:
        config: heads, widths, positions.
        hidden_size: D.
        layer: the layer's number, under which the cache keeps its keys and values.
    """

    def __init__(self, config: AttentionConfig, hidden_size: int, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.q_proj = Linear(hidden_size, heads * dim, bias=config.qkv_bias)
        self.k_proj = Linear(hidden_size, kv_heads * dim, bias=config.qkv_bias)
        self.v_proj = Linear(hidden_size, kv_heads * dim, bias=config.qkv_bias)
        self.o_proj = Linear(heads * dim, hidden_size, bias=config.out_bias)
        self.position = build_position(config.position, dim)
        self.rule = AttentionRule(scale=dim**-0.5, causal=config.causal, window=config.window)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """`x: [T, D]` → [T, D]."""
        heads = (x.shape[0], -1, self.config.head_dim)
        q = self.position.rotate(self.q_proj(x).view(heads), context)  # [T, H, d]
        k = self.position.rotate(self.k_proj(x).view(heads), context)  # [T, K, d]
        v = self.v_proj(x).view(heads)
        if context.store is None:
            out = attention(q, k, v, self.rule, context.lengths)
        else:
            out = context.store.attend(self.layer, q, k, v, self.rule)
        return self.o_proj(out.reshape(x.shape[0], -1))
