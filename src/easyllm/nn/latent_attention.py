"""Multi-head latent attention (MLA): keys and values are projected up from one vector per token.

    q_h  = [q_h^nope ; rope(q_h^rope)]        c = N(W_dkv x),  k^rope = rope(W_kr x)
    k_h  = [W_uk,h c ; k^rope]                v_h = W_uv,h c

(DeepSeek-V2: arXiv 2405.04434, eqs. 9 to 19; `kv_a_proj` holds W_dkv and W_kr, `kv_b_proj` W_uk and
W_uv.) Without a cache, keys and values are computed for each head. With one, only c and k^rope are
stored, and W_uk and W_uv move to the other side (the same section, "absorbed"):

    q_h · k_h   = [W_uk,hᵀ q_h^nope ; rope(q_h^rope)] · [c ; k^rope]
    Σ_j p_j v_hj = W_uv,h Σ_j p_j c_j

which is attention with a single key-value head of width kv_rank + rope_dim.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from easyllm.nn.config import LatentAttentionConfig
from easyllm.nn.context import AdapterRows, ForwardContext
from easyllm.nn.cost import FP32, INT64, Activation, CostTrace, Scores
from easyllm.nn.linear import KnownProduct, Linear
from easyllm.nn.norm import build_norm
from easyllm.nn.position_config import YarnScaling
from easyllm.nn.rope_scaling import yarn_mscale
from easyllm.nn.rotary import RotaryPosition
from easyllm.ops.attention import attention
from easyllm.ops.attention_rule import AttentionRule


class LatentAttention(nn.Module):
    """Latent attention with H heads (arXiv 2405.04434, section 2.1).

    Args:
        config: ranks, widths of the parts of a head, RoPE.
        hidden_size: D.
        layer: the layer's number, under which the KV cache stores its latent vectors.
    """

    def __init__(self, config: LatentAttentionConfig, hidden_size: int, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        heads, rank, bias = config.num_heads, config.kv_rank, config.bias
        queries = heads * config.query_dim
        self.q_proj: Linear | None = None
        self.q_a_proj: Linear | None = None
        if config.q_rank is None:
            self.q_proj = Linear(hidden_size, queries)
        else:
            self.q_a_proj = Linear(hidden_size, config.q_rank, bias=bias)
            self.q_a_norm = build_norm(config.norm, config.q_rank)
            self.q_b_proj = Linear(config.q_rank, queries)
        self.kv_a_proj = Linear(hidden_size, config.cache_dim, bias=bias)
        self.kv_a_norm = build_norm(config.norm, rank)
        self.kv_b_proj = Linear(rank, heads * (config.nope_dim + config.value_dim))
        self.o_proj = Linear(heads * config.value_dim, hidden_size, bias=bias)
        self.position = RotaryPosition(config.position, config.rope_dim)
        self.rule = AttentionRule(scale=_scale(config), causal=config.causal)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """Returns the output [T, D] for `x: [T, D]`."""
        config, inner = self.config, context.of_sequences
        q = context.to_sequences(self._queries(x, context))  # [T', H, nope + rope]
        latent, key = self.kv_a_proj(x, context).split([config.kv_rank, config.rope_dim], dim=-1)
        latent = self.kv_a_norm(latent)  # [T, kv_rank]
        rotated = self.position.rotate(context.to_sequences(key)[:, None], inner)  # [T', 1, rope]
        q_nope, q_rope = q.split([config.nope_dim, config.rope_dim], dim=-1)
        q_rope = self.position.rotate(q_rope, inner)
        if inner.store is not None:
            out = self._attend_latent(q_nope, q_rope, latent, rotated, inner)
        else:
            kv = context.to_sequences(self.kv_b_proj(latent, context))
            q = torch.cat([q_nope, q_rope], dim=-1)
            out = self._attend(q, kv.unflatten(-1, (config.num_heads, -1)), rotated, inner)
        return self.o_proj(context.to_rows(out).flatten(1), context)

    def _queries(self, x: Tensor, context: ForwardContext) -> Tensor:
        """Returns the queries [T, H, nope + rope] of `x: [T, D]`, not yet rotated."""
        if self.q_proj is not None:
            q = self.q_proj(x, context)
        else:
            assert self.q_a_proj is not None, "queries have one projection or two"
            q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x, context)), context)
        return q.view(len(q), self.config.num_heads, self.config.query_dim)

    def _attend(self, q: Tensor, kv: Tensor, rotated: Tensor, context: ForwardContext) -> Tensor:
        """Returns the output [T, H, value] with keys and values of each head.

        Args:
            q: [T, H, nope + rope], rotated.
            kv: [T, H, nope + value], keys without position and values.
            rotated: [T, 1, rope], the shared rotated key.
            context: the context of complete sequences.
        """
        config = self.config
        k_nope, v = kv.split([config.nope_dim, config.value_dim], dim=-1)
        k = torch.cat([k_nope, rotated.expand(-1, config.num_heads, -1)], dim=-1)
        # the kernels need one width: zeros change neither dot products nor the first values
        width = max(config.query_dim, config.value_dim)
        q, k, v = (_padded(y, width) for y in (q, k, v))
        out = attention(q, k, v, self.rule, context.lengths, context.prefix_lengths)
        return out[..., : config.value_dim]

    def _attend_latent(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        rotated: Tensor,
        context: ForwardContext,
    ) -> Tensor:
        """Stores `latent: [T, kv_rank]` and `rotated`; returns the output [T, H, value]."""
        config, weights = self.config, list(self._up_weights(context))
        stored = torch.cat([latent[:, None], rotated], dim=-1)  # [T, 1, kv_rank + rope]
        folded = q_nope.new_empty(*q_nope.shape[:2], config.kv_rank)
        for rows, weight in weights:
            at = slice(None) if rows is None else rows
            up = weight[:, : config.nope_dim]  # [H, nope, kv_rank]
            folded[at] = torch.einsum("tgn,gnr->tgr", q_nope[at], up)
        q = torch.cat([folded, q_rope], dim=-1)
        assert context.store is not None, "checked by forward()"
        mixed = context.store.attend(
            self.layer, q, stored, None, self.rule, context.prefix_lengths
        )[..., : config.kv_rank]
        out = mixed.new_empty(*mixed.shape[:2], config.value_dim)
        for rows, weight in weights:
            at = slice(None) if rows is None else rows
            up = weight[:, config.nope_dim :]  # [H, value, kv_rank]
            out[at] = torch.einsum("tgr,gvr->tgv", mixed[at], up)
        return out

    def _up_weights(self, context: ForwardContext) -> Iterator[tuple[Tensor | None, Tensor]]:
        """Yields the rows that share a weight (None: all) and `kv_b_proj`, with their adapter.

        Adapters are linear, so that of the unit vectors is the transposed weight.

        Yields:
            [N] int64, and [H, nope + value, kv_rank].
        """
        layer, heads = self.kv_b_proj, self.config.num_heads
        dense = layer.storage.dense()
        if layer.adapter is None or context.base_only:
            yield None, dense.unflatten(0, (heads, -1))
            return
        units = torch.eye(dense.shape[1], dtype=dense.dtype, device=dense.device)
        groups = ((None, None),) if context.adapters is None else context.adapters.groups
        for name, rows in groups:
            one = context
            if name is not None:
                index = torch.zeros(len(units), dtype=torch.int64, device=dense.device)
                one = replace(context, adapters=AdapterRows((name,), index))
            known = KnownProduct(layer, one, x=units, y=dense.T.clone())
            adapted = layer.adapter(units, known).T
            yield rows, adapted.unflatten(0, (heads, -1))

    def cost(self, trace: CostTrace, x: Activation) -> Activation:
        """Records the projections, the norms of the latent vectors and attention."""
        config, work = self.config, trace.work
        if self.q_proj is not None:
            q = trace.linear(self.q_proj, "q_proj", x, part="attention")
        else:
            assert self.q_a_proj is not None, "queries have one projection or two"
            q = trace.linear(self.q_a_proj, "q_a_proj", x, part="attention")
            q = trace.of(self.q_a_norm, q, "q_a_norm")
            q = trace.linear(self.q_b_proj, "q_b_proj", q, part="attention")
        latent = trace.linear(self.kv_a_proj, "kv_a_proj", x, part="attention")
        latent = trace.of(self.kv_a_norm, latent, "kv_a_norm")
        kv = trace.linear(self.kv_b_proj, "kv_b_proj", latent, part="attention")
        width = config.num_heads * max(config.query_dim, config.value_dim)
        grad = q.grad or kv.grad
        mixed = trace.made("mixed", width, grad=grad)
        if grad:
            for name in ("q.joined", "k.joined", "v.joined"):
                trace.keep_all(trace.made(name, width, grad=True))
            trace.keep_all(mixed)
            trace.keep("log_normaliser", work.tokens * config.num_heads * FP32)
            trace.keep("starts", (len(work.lengths) + 1) * INT64)
        flops = 2 * config.num_heads * self._pairs(trace)
        scores = Scores(q, kv, kv, config.num_heads, config.query_dim, flops * config.query_dim)
        trace.product("scores", scores.flops, scores.flops * (q.grad + kv.grad))
        values = flops * config.value_dim
        trace.product("scores", values, values * (grad + kv.grad))
        out = trace.made("mixed.values", config.num_heads * config.value_dim, grad=grad)
        return trace.linear(self.o_proj, "o_proj", out, part="attention")

    def _pairs(self, trace: CostTrace) -> int:
        """Returns the number of query-key pairs that are counted."""
        all_pairs = trace.work.counting == "full" or not self.config.causal
        return sum(n * n if all_pairs else n * (n + 1) // 2 for n in trace.work.lengths)

    def cached_flops(self, context: int) -> int:
        """Returns the FLOPs of attention over cached latent vectors for one more token.

        Args:
            context: the length of the sequence, including this token.
        """
        per_key = self.config.cache_dim + self.config.kv_rank
        return 2 * (context - 1) * self.config.num_heads * per_key

    def cache_elements(self) -> int:
        """Returns the number of cached elements per token: kv_rank + rope_dim."""
        return self.config.cache_dim

    def state_bytes(self) -> int:
        """Returns the bytes of a sequence's fixed-size state, which attention does not have."""
        return 0


def _scale(config: LatentAttentionConfig) -> float:
    """Returns the factor on the dot products, with DeepSeek's factor for YaRN."""
    scaling = config.position.scaling
    factor = yarn_mscale(scaling.factor, config.mscale) if isinstance(scaling, YarnScaling) else 1.0
    return float(config.query_dim**-0.5 * factor**2)


def _padded(x: Tensor, width: int) -> Tensor:
    """Returns `x` with zeros up to `width` in its last dimension."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))
