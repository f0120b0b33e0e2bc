"""FlashAttention's algorithm in plain PyTorch: exact attention by tiles, in linear memory.

Forward (Dao et al. 2022, arXiv 2205.14135, algorithm 1): for each tile of queries, iterate over the
tiles of keys and update a running maximum m, a running normalizer l and an unnormalized output o
(online softmax):

    m' = max(m, rowmax S)      l' = e^(m-m') l + rowsum e^(S-m')      o' = e^(m-m') o + e^(S-m') V

Backward (algorithm 4): recompute the scores from q, k and the saved log-normalizer L = m + log l;
with P = e^(S-L) and D = rowsum(dO ⊙ O):

    dV += Pᵀ dO      dS = P ⊙ (dO Vᵀ - D) · scale      dQ += dS K      dK += dSᵀ Q

This file is for reading and for verifying the result at every tile size; models run
`ops/attention`.
"""

import torch
from torch import Tensor

from easyllm.ops.attention import visible
from easyllm.ops.attention_rule import AttentionRule
from easyllm.ops.autograd import Context


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: AttentionRule,
    *,
    query_tile: int = 64,
    key_tile: int = 64,
) -> Tensor:
    """Computes attention of one sequence tile by tile.

    Args:
        q: [Tq, H, d]; k, v: [Tk, K, d]; the queries are the last Tq of the Tk tokens; H % K == 0.
        rule: scale, causality, window.
        query_tile, key_tile: rows and columns of a tile; the result does not depend on them.

    Returns:
        [Tq, H, d], dtype of `q`; differentiable, with no [Tq, Tk] matrix in either pass.
    """
    out: Tensor = _TiledAttention.apply(q, k, v, rule, query_tile, key_tile)
    return out


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, rows: int, columns: int
    ) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        heads = q.shape[1]
        q_h, k_h, v_h = _by_head(q, heads, wide), _by_head(k, heads, wide), _by_head(v, heads, wide)
        mask = _Tiles(q.shape[0], k.shape[0], rule, q.device)
        out = torch.zeros_like(q_h)
        log_z = q_h.new_empty(q_h.shape[:2])
        for i in range(0, q.shape[0], rows):
            query = q_h[:, i : i + rows]
            top = query.new_full(query.shape[:2], float("-inf"))
            total, acc = torch.zeros_like(top), torch.zeros_like(query)
            for j in range(0, k.shape[0], columns):
                scores = query @ k_h[:, j : j + columns].mT * rule.scale
                scores = scores.masked_fill(~mask.tile(i, rows, j, columns), float("-inf"))
                new_top = torch.maximum(top, scores.amax(-1))
                safe = new_top.masked_fill(new_top.isinf(), 0)  # rows that have seen no key yet
                shrink = (top - safe).exp()
                weights = (scores - safe[..., None]).exp()
                total = total * shrink + weights.sum(-1)
                acc = acc * shrink[..., None] + weights @ v_h[:, j : j + columns]
                top = new_top
            out[:, i : i + rows] = acc / total[..., None]
            log_z[:, i : i + rows] = top + total.log()
        ctx.save_for_backward(q_h, k_h, v_h, out, log_z)
        ctx.rule, ctx.tiles, ctx.kv_heads = rule, (rows, columns), k.shape[1]
        ctx.dtypes = (q.dtype, k.dtype, v.dtype)
        return out.transpose(0, 1).to(q.dtype)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_z = ctx.saved_tensors
        rule, (rows, columns) = ctx.rule, ctx.tiles
        grad = grads[0].transpose(0, 1).to(q.dtype)  # [H, Tq, d]
        delta = (grad * out).sum(-1)
        mask = _Tiles(q.shape[1], k.shape[1], rule, q.device)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for j in range(0, k.shape[1], columns):
            key, value = k[:, j : j + columns], v[:, j : j + columns]
            for i in range(0, q.shape[1], rows):
                at = slice(i, i + rows)
                scores = q[:, at] @ key.mT * rule.scale
                p = (scores - log_z[:, at, None]).exp()
                p = p.masked_fill(~mask.tile(i, rows, j, columns), 0)
                dv[:, j : j + columns] += p.mT @ grad[:, at]
                ds = p * (grad[:, at] @ value.mT - delta[:, at, None]) * rule.scale
                dq[:, at] += ds @ key
                dk[:, j : j + columns] += ds.mT @ q[:, at]
        q_dtype, k_dtype, v_dtype = ctx.dtypes
        return (
            dq.transpose(0, 1).to(q_dtype),
            _grouped(dk, ctx.kv_heads).to(k_dtype),
            _grouped(dv, ctx.kv_heads).to(v_dtype),
            None,
            None,
            None,
        )


class _Tiles:
    """Computes tiles of the attention mask without materializing all of it."""

    def __init__(
        self, num_queries: int, num_keys: int, rule: AttentionRule, device: torch.device
    ) -> None:
        self.num_queries, self.num_keys = num_queries, num_keys
        self.rule, self.device = rule, device

    def tile(self, i: int, rows: int, j: int, columns: int) -> Tensor:
        first = self.num_keys - self.num_queries
        query = torch.arange(i, min(i + rows, self.num_queries), device=self.device) + first
        key = torch.arange(j, min(j + columns, self.num_keys), device=self.device)
        return visible(query, key, self.rule)


def _by_head(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Rearranges [T, K, d] to [H, T, d], repeating each KV head for its group."""
    return x.to(dtype).repeat_interleave(heads // x.shape[1], dim=1).transpose(0, 1).contiguous()


def _grouped(grad: Tensor, kv_heads: int) -> Tensor:
    """Reduces [H, T, d] to [T, K, d] by summing the gradients of each group."""
    heads, length, dim = grad.shape
    return grad.view(kv_heads, heads // kv_heads, length, dim).sum(1).transpose(0, 1)
