"""Softmax attention: MHA, GQA and MQA by the number of key-value heads; masks and positions by configuration."""

import math

import torch
from torch import Tensor, nn

from easyllm.nn.config import AttentionConfig
from easyllm.nn.context import ForwardContext
from easyllm.nn.linear import Linear, outputs_of
from easyllm.nn.norm import build_norm
from easyllm.nn.position import build_position
from easyllm.ops.attention import AttentionRule, attention
from easyllm.ops.deterministic import deterministic_attention


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245): H query heads share K key-value heads.

    Args:
        config: heads, widths, positions, mask.
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
        self.q_norm = build_norm(config.qk_norm, dim) if config.qk_norm else nn.Identity()
        self.k_norm = build_norm(config.qk_norm, dim) if config.qk_norm else nn.Identity()
        self.position = build_position(
            config.position,
            num_heads=heads,
            head_dim=dim,
            causal=config.causal,
            window=config.window,
            num_sinks=config.num_sinks,
        )
        self.rule = AttentionRule(
            scale=config.scale or dim**-0.5,
            causal=config.causal,
            window=config.window,
            num_sinks=config.num_sinks,
            softcap=config.softcap,
            terms=self.position.terms,
        )

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """`x: [T, D]` → [T, D]."""
        heads = (x.shape[0], -1, self.config.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (y.view(heads) for y in outputs_of(projections, x, context))
        q = self.position.rotate(self.q_norm(q), context)  # [T, H, d]
        k = self.position.rotate(self.k_norm(k), context)  # [T, K, d]
        if context.virtual is not None:
            k, v = context.virtual.keys_values(self.layer, k, v)
        if self.config.logn_length is not None:
            q = q * logn_factors(context.positions, self.config.logn_length).to(q.dtype)
        if context.store is None and context.deterministic and context.prefix_lengths is None:
            out = deterministic_attention(q, k, v, self.rule, context.lengths)
        elif context.store is None:
            out = attention(q, k, v, self.rule, context.lengths, context.prefix_lengths)
        else:
            out = context.store.attend(self.layer, q, k, v, self.rule, context.prefix_lengths)
        return self.o_proj(out.reshape(x.shape[0], -1), context)


def logn_factors(positions: Tensor, length: int) -> Tensor:
    """[T, 1, 1] fp32: max(1, log n / log length) for the n = position + 1 tokens a query sees, which keeps the entropy of
    attention steady beyond the trained length (Su 2021, "logn")."""
    factors = torch.log(positions.float() + 1) / math.log(length)
    return factors.clamp(min=1.0)[:, None, None]
