"""Softmax attention: MHA, GQA or MQA, depending on the number of key-value heads.

Masks and positions are selected by configuration.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from easyllm.nn.config import AttentionConfig
from easyllm.nn.context import ForwardContext
from easyllm.nn.cost import FP32, INT64, Activation, CostTrace, Scores
from easyllm.nn.linear import Linear, fused_linears
from easyllm.nn.norm import build_norm
from easyllm.nn.pairs import pairs_of_heads, visible_keys
from easyllm.nn.position import build_position
from easyllm.ops.attention import attention
from easyllm.ops.attention_backends import C_TRAINING, SDPA
from easyllm.ops.attention_rule import AttentionRule
from easyllm.ops.deterministic import deterministic_attention
from easyllm.ops.shifted_attention import shifted_attention


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245): H query heads share K key-value heads.

    Args:
        config: heads, widths, positions, mask.
        hidden_size: D.
        layer: the layer's number, under which the KV cache stores its keys and values.
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
        self.shift_group: int | None = None  # training may limit attention to groups
        self.rule = AttentionRule(
            scale=config.scale or dim**-0.5,
            causal=config.causal,
            window=config.window,
            num_sinks=config.num_sinks,
            softcap=config.softcap,
            directions=config.directions,
            terms=self.position.terms,
        )

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """Returns the output [T, D] for `x: [T, D]`."""
        heads = (x.shape[0], -1, self.config.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (y.view(heads) for y in fused_linears(projections, x, context))
        q, k, v = (context.to_sequences(y) for y in (self.q_norm(q), self.k_norm(k), v))
        out = self._attend(q, k, v, context.of_sequences)
        return self.o_proj(context.to_rows(out).reshape(x.shape[0], -1), context)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: ForwardContext) -> Tensor:
        """Returns the output [T, H, d] for normalised `q: [T, H, d]` and `k`, `v: [T, K, d]`."""
        q = self.position.rotate(q, context)
        k = self.position.rotate(k, context)
        if context.virtual is not None:
            k, v = context.virtual.keys_values(self.layer, k, v)
        if self.config.logn_length is not None:
            q = q * logn_factors(context.positions, self.config.logn_length).to(q.dtype)
        if context.store is not None:
            return context.store.attend(self.layer, q, k, v, self.rule, context.prefix_lengths)
        if self.shift_group is not None and self.training:
            return shifted_attention(q, k, v, self.rule, context.lengths, self.shift_group)
        if context.deterministic and context.prefix_lengths is None:
            return deterministic_attention(q, k, v, self.rule, context.lengths)
        return attention(q, k, v, self.rule, context.lengths, context.prefix_lengths)

    def shift_unsupported_reason(self) -> str | None:
        """Returns why attention in shifted groups is not supported; None if it is."""
        if self.config.num_heads % 2 or self.config.num_kv_heads % 2:
            return "an odd number of heads"
        if self.rule.terms is not None:
            return "positions that change the scores"
        return None if self.config.causal else "bidirectional attention"

    def cost(self, trace: CostTrace, x: Activation) -> Activation:
        """Records the projections, the matrix products of attention and the tensors autograd saves.

        The saved tensors depend on whether attention runs in a tiled kernel, with a floating-point
        mask, or with materialised scores.
        """
        config, work = self.config, trace.work
        q = trace.linear(self.q_proj, "q_proj", x, part="attention")
        k = trace.linear(self.k_proj, "k_proj", x, part="attention")
        v = trace.linear(self.v_proj, "v_proj", x, part="attention")
        q = self._rotated_cost(trace, self.q_norm, q, config.num_heads)
        k = self._rotated_cost(trace, self.k_norm, k, config.num_kv_heads)
        if work.keys_grad:
            k, v = replace(k, grad=True), replace(v, grad=True)
        if config.logn_length is not None and q.grad:
            trace.keep("logn", work.tokens * work.itemsize)
            q = Activation("q.scaled", q.nbytes, grad=True)
        width = config.num_heads * config.head_dim
        out = trace.made("mixed", width, grad=q.grad or k.grad or v.grad)
        position = self.position
        # SDPA materialises the scores too if its mask has a gradient
        written = SDPA.rule_unsupported_reason(self.rule) is not None
        written = written or (position.trained_mask and work.trains_all)
        pairs = sum(pairs_of_heads(config, n, work.counting) for n in work.lengths)
        flops = 2 * pairs * config.head_dim
        scores = Scores(q, k, v, config.num_heads, config.head_dim, flops=flops)
        if out.grad and written:
            self._keep_scores(trace, scores)
        elif out.grad:
            out = self._keep_tiles(trace, q, k, v, out)
        trace.product("scores", scores.flops, scores.flops * (q.grad + k.grad))
        trace.product("scores", scores.flops, scores.flops * ((q.grad or k.grad) + v.grad))
        position.score_products(trace, scores)
        return trace.linear(self.o_proj, "o_proj", out, part="attention")

    def _rotated_cost(
        self, trace: CostTrace, norm: nn.Module, x: Activation, heads: int
    ) -> Activation:
        """Records the norm and the rotation of queries or keys."""
        if not isinstance(norm, nn.Identity):
            x = trace.of(norm, x, f"{x.name}.normed", rows=trace.work.tokens * heads)
        return self.position.cost(trace, x)

    def _keep_tiles(
        self, trace: CostTrace, q: Activation, k: Activation, v: Activation, out: Activation
    ) -> Activation:
        """Records the tensors saved by tiled attention.

        This is the C kernel (or on a GPU that of SDPA, which saves the same tensors); otherwise
        SDPA with a floating-point mask, one sequence at a time, with concatenated outputs.
        """
        config, lengths = self.config, trace.work.lengths
        trace.keep_all(q, k, v, out)
        trace.keep("log_normaliser", trace.work.tokens * config.num_heads * FP32)
        if C_TRAINING.rule_unsupported_reason(self.rule) is None:
            trace.keep("starts", (len(lengths) + 1) * INT64)
            return out
        by_head = self.position.mask_per_head or config.directions is not None
        masks = config.num_heads if by_head else 1
        trace.keep("mask", masks * trace.work.pairs * trace.work.itemsize)
        if len(lengths) == 1:
            return out
        return Activation("mixed.joined", out.nbytes, out.grad)

    def _keep_scores(self, trace: CostTrace, scores: Scores) -> None:
        """Records the tensors saved with materialised scores.

        These are queries, keys, values and weights in fp32, and what the positions add.
        """
        work, q, k, heads = trace.work, scores.q, scores.k, scores.heads
        wide = work.tokens * heads * scores.dim * FP32
        trace.keep("weights", heads * work.pairs * FP32)
        if k.grad or (work.trains_all and self.position.learns_from_queries):
            trace.keep(q.name if work.itemsize == FP32 else "q.wide", wide)
        if q.grad:
            trace.keep("k.repeated", wide)
        if q.grad or k.grad:
            trace.keep("v.repeated", wide)
            trace.keep("visible", work.pairs)
            if self.config.softcap is not None:
                trace.keep("capped", heads * work.pairs * FP32)
        self.position.keep_scores(trace, scores)

    def cached_flops(self, context: int) -> int:
        """Returns the FLOPs of attention over cached keys and values for one more token.

        Args:
            context: the length of the sequence, including this token.
        """
        earlier = visible_keys(self.config, context) - 1
        return 4 * earlier * self.config.num_heads * self.config.head_dim

    def cache_elements(self) -> int:
        """Returns the number of cached elements per token (key and value)."""
        return 2 * self.config.num_kv_heads * self.config.head_dim

    def state_bytes(self) -> int:
        """Returns the bytes of a sequence's fixed-size state, which attention does not have."""
        return 0


def logn_factors(positions: Tensor, length: int) -> Tensor:
    """Returns the logn factors of queries: max(1, log n / log length), [T, 1, 1] fp32.

    n = position + 1 is the number of tokens that a query sees. The factor keeps the entropy of
    attention stable beyond the training length (Su 2021, "logn").
    """
    factors = torch.log(positions.float() + 1) / math.log(length)
    return factors.clamp(min=1.0)[:, None, None]
