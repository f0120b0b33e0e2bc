"""Attention over packed sequences.

Shapes: T packed tokens, S sequences, H query heads, K key-value heads, d head_dim.

    out_i = Σ_j softmax_j(scale · q_i·k_j) v_j        over the keys j that are visible to query i

(Vaswani et al. 2017, arXiv 1706.03762, eq. 1; grouped-query attention: Ainslie et al. 2023, arXiv
2305.13245.)
Sequences are packed end to end in T; a query never sees a key of another sequence (block-diagonal
mask).

Implementations, of which `attention_backends` picks one: the C kernels for training on a CPU and
FlashAttention on a GPU in bf16 or fp16, both for all sequences at once; PyTorch's SDPA, with a mask
if needed; `explicit_attention`, which materializes the scores, for soft caps and for position
encodings that change the scores other than by a bias.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from easyllm.ops.attention_backends import C_TRAINING, FLASH, SDPA, AttentionCall, pick_backend
from easyllm.ops.attention_rule import AttentionRule, ScoreTerms
from easyllm.ops.autograd import Context
from easyllm.ops.flash import flash_attention
from easyllm.ops.kernels import kernels_for
from easyllm.ops.kernels.structs import (
    DTYPE_CODES,
    AttentionBackward,
    AttentionShape,
    address,
    has_contiguous_heads,
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: AttentionRule,
    lengths: tuple[int, ...],
    prefix_lengths: tuple[int, ...] | None = None,
) -> Tensor:
    """Computes self-attention within each packed sequence.

    Args:
        q: [T, H, d] queries; k, v: [T, K, d] keys and values of the same tokens; H % K == 0.
        rule: scale, mask and position terms.
        lengths: number of tokens of each sequence, summing to T.
        prefix_lengths: number of leading tokens of each sequence that see each other
            bidirectionally (prefix LM).

    Returns:
        [T, H, d], dtype of `q`.
    """
    call = AttentionCall(
        rule,
        q.device,
        q.dtype,
        k.dtype,
        v.dtype,
        q.shape[-1],
        # in prefix tuning the first layer's keys and values have a gradient, but not its queries
        gradients=torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)),
        prefix=prefix_lengths is not None,
    )
    backend = pick_backend(call)
    if backend is C_TRAINING:
        packed: Tensor = _KernelAttention.apply(q, k, v, rule, lengths)
        return packed
    if backend is FLASH:
        return flash_attention(
            q, k, v, lengths, lengths, scale=rule.scale, causal=rule.causal, window=rule.window
        )
    prefixes = prefix_lengths or (0,) * len(lengths)
    segments = zip(q.split(lengths), k.split(lengths), v.split(lengths), prefixes, strict=True)
    out = [attend_segment(qs, ks, vs, rule, prefix=prefix) for qs, ks, vs, prefix in segments]
    return out[0] if len(out) == 1 else torch.cat(out)


def attend_segment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: AttentionRule,
    *,
    prefix: int = 0,
    key_positions: Tensor | None = None,
) -> Tensor:
    """Computes attention of one sequence, whose queries are its last `len(q)` tokens.

    Args:
        q: [Tq, H, d]; k, v: [Tk, K, d]; Tq ≤ Tk.
        rule: scale, mask and position terms.
        prefix: number of first positions that see each other bidirectionally.
        key_positions: [Tk], ascending; the last Tq are the positions of the queries. 0 .. Tk-1 by
            default; a rolling cache has gaps.

    Returns:
        [Tq, H, d], dtype of `q`.
    """
    num_queries, num_keys = q.shape[0], k.shape[0]
    key = torch.arange(num_keys, device=q.device) if key_positions is None else key_positions
    query = key[num_keys - num_queries :]
    if SDPA.rule_unsupported_reason(rule) is not None:
        return explicit_attention(q, k, v, rule, query, key, prefix=prefix)
    all_near = not _window_hides_keys(rule, key)
    by_head = rule.directions is not None and (not rule.causal or prefix > 1)
    whole = num_queries == num_keys and prefix <= 1 and all_near
    causal = rule.causal and num_queries > 1 and whole
    sees_all = (not rule.causal or num_queries == 1) and all_near and not by_head
    mask = None
    if rule.terms is not None and rule.terms.bias is not None:
        bias = rule.terms.bias(query, key).to(q.dtype)
        mask = bias.masked_fill(~visible(query, key, rule, prefix=prefix), float("-inf"))
        causal = False
    elif not causal and not sees_all:
        mask = visible(query, key, rule, prefix=prefix)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],  # [1, H, Tq, d]
        k.transpose(0, 1)[None],  # [1, K, Tk, d]
        v.transpose(0, 1)[None],
        attn_mask=None if mask is None else mask[None] if mask.ndim == 3 else mask,
        is_causal=causal,
        scale=rule.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


def visible(query: Tensor, key: Tensor, rule: AttentionRule, *, prefix: int = 0) -> Tensor:
    """Returns the attention mask [Tq, Tk] bool: which keys each query sees, by position.

    It is [H, Tq, Tk] if heads have directions of their own.
    """
    query, key = query[:, None], key[None, :]
    mask = torch.ones(query.shape[0], key.shape[1], dtype=torch.bool, device=query.device)
    if rule.causal:
        mask &= key <= query
    if rule.window is not None:
        near = key > query - rule.window
        mask &= near | (key < rule.num_sinks) if rule.num_sinks else near
        if not rule.causal:
            mask &= key < query + rule.window
    if prefix:
        inside = (key < prefix) & (query < prefix)
        mask |= inside
    if rule.directions is None or (rule.causal and not prefix):
        return mask
    hidden = {"forward": key > query, "backward": key < query, "both": torch.zeros_like(mask)}
    by_head = torch.stack([hidden[direction] for direction in rule.directions])
    return mask & ~(by_head & inside if rule.causal else by_head)


def explicit_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: AttentionRule,
    query: Tensor,
    key: Tensor,
    *,
    prefix: int = 0,
) -> Tensor:
    """Computes attention with materialized scores in fp32 or wider: the reference for all others.

    Args:
        q: [Tq, H, d]; k, v: [Tk, K, d].
        rule: scale, mask and position terms.
        query, key: positions, [Tq] and [Tk].
        prefix: number of first positions that see each other bidirectionally.

    Returns:
        [Tq, H, d], dtype of `q`.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    q_h = q.transpose(0, 1).to(wide)  # [H, Tq, d]
    k_h, v_h = (x.repeat_interleave(groups, dim=1).transpose(0, 1).to(wide) for x in (k, v))
    terms = rule.terms or ScoreTerms()
    scores = q_h @ k_h.mT if terms.scores is None else terms.scores(q_h, k_h, query, key)
    scores = scores * rule.scale
    if terms.bias is not None:
        scores = scores + terms.bias(query, key)
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    mask = visible(query, key, rule, prefix=prefix)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    out = weights @ v_h
    if terms.values is not None:
        out = out + terms.values(weights, query, key)
    return out.transpose(0, 1).to(q.dtype)


def reference_attention(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
    """Runs `explicit_attention` on one sequence, whose queries are its last tokens."""
    key = torch.arange(k.shape[0], device=q.device)
    return explicit_attention(q, k, v, rule, key[len(key) - len(q) :], key)


def _window_hides_keys(rule: AttentionRule, key: Tensor) -> bool:
    """Returns whether the window hides any key from the last query."""
    return rule.window is not None and int(key[-1]) - int(key[0]) >= rule.window


class _KernelAttention(torch.autograd.Function):
    """The C kernels: all sequences in one call; backward is several times faster than SDPA's."""

    @staticmethod
    def forward(
        ctx: Context, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, lengths: tuple[int, ...]
    ) -> Tensor:
        q, k, v = (x if has_contiguous_heads(x) else x.contiguous() for x in (q, k, v))
        kernels = kernels_for(q, k, v)
        assert kernels is not None, "picked by attention()"
        starts = torch.tensor([0, *lengths]).cumsum(0)
        shape = AttentionShape(
            heads=q.shape[1],
            kv_heads=k.shape[1],
            dim=q.shape[2],
            q_stride=q.stride(0),
            k_stride=k.stride(0),
            v_stride=v.stride(0),
            dtype=DTYPE_CODES[q.dtype],
            scale=rule.scale,
            causal=rule.causal,
            window=rule.window or 0,
        )
        out = torch.empty(q.shape, dtype=q.dtype)
        lse = torch.empty(q.shape[:2])
        kernels.attention_forward(*map(address, (q, k, v, out, lse, starts)), len(lengths), shape)
        ctx.save_for_backward(q, k, v, out, lse, starts)
        ctx.shape = shape
        return out

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse, starts = ctx.saved_tensors
        grad = grads[0].contiguous()
        kernels = kernels_for(grad, q, k, v)
        assert kernels is not None, "picked by attention()"
        grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
        tensors = AttentionBackward(
            grad=address(grad),
            out=address(out),
            q=address(q),
            k=address(k),
            v=address(v),
            lse=address(lse),
            grad_q=address(grad_q),
            grad_k=address(grad_k),
            grad_v=address(grad_v),
            starts=address(starts),
            num_sequences=len(starts) - 1,
        )
        kernels.attention_backward(tensors, ctx.shape)
        return grad_q, grad_k, grad_v, None, None
