"""Attention over packed sequences.

Shapes: T packed tokens, S sequences, H query heads, K key-value heads, d head_dim.

    out_i = Σ_j softmax_j(scale · q_i·k_j) v_j        over the keys j that query i may see

(Vaswani et al. 2017, arXiv 1706.03762, eq. 1; grouped heads: Ainslie et al. 2023, arXiv 2305.13245.)
Sequences lie end to end in T; a query never sees a key of another sequence.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from easyllm.ops.kernels import kernels_for
from easyllm.ops.kernels.build import DTYPE_CODES, AttentionShape


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRule:
    """What a layer asks of attention, whatever the batch."""

    scale: float
    causal: bool = True
    window: int | None = None
    """A query at position i sees keys at positions > i - window."""


class KeyValueStore(Protocol):
    """Where keys and values live between forward passes; the engine's cache implements it."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
        """Stores `k`, `v: [T, K, d]` for `layer`; returns the outputs of `q: [T, H, d]`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionContext:
    """Everything attention needs to know of a batch; an argument, never a global.

    Attributes:
        positions: [T] int64, the position of each token in its own sequence.
        lengths: tokens of each sequence in this forward pass; they sum to T.
        store: where earlier keys and values live; None when every key is in this forward pass.
        memo: values computed once a forward pass and shared by the layers.
    """

    positions: Tensor
    lengths: tuple[int, ...]
    store: KeyValueStore | None = None
    memo: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def packed(
        cls,
        lengths: list[int] | tuple[int, ...],
        *,
        device: torch.device | str = "cpu",
        store: KeyValueStore | None = None,
        offsets: list[int] | None = None,
    ) -> "AttentionContext":
        """The context of sequences laid end to end; `offsets` are their first positions."""
        offsets = offsets or [0] * len(lengths)
        parts = [
            torch.arange(start, start + n, device=device)
            for n, start in zip(lengths, offsets, strict=True)
        ]
        positions = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)
        return cls(positions=positions, lengths=tuple(lengths), store=store)

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """The value of `compute()`, computed by the first layer that asks for `key`."""
        if key not in self.memo:
            self.memo[key] = compute()
        return self.memo[key]


def attention(
    q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, lengths: tuple[int, ...]
) -> Tensor:
    """Self-attention of each packed sequence with itself.

    Args:
        q: [T, H, d] queries; k, v: [T, K, d] keys and values of the same tokens; H % K == 0.
        rule: scale, causality, window.
        lengths: tokens of each sequence, summing to T.

    Returns:
        [T, H, d], dtype of `q`.
    """
    kernels = kernels_for(q, k, v)
    if kernels is not None and _kernel_fits(q) and torch.is_grad_enabled() and q.requires_grad:
        packed: Tensor = _KernelAttention.apply(q, k, v, rule, lengths)
        return packed
    if len(lengths) == 1:
        return attend_segment(q, k, v, rule)
    out = [
        attend_segment(*parts, rule)
        for parts in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    ]
    return torch.cat(out)


def attend_segment(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
    """Attention of one sequence: the last `len(q)` of its `len(k)` tokens ask.

    Args:
        q: [Tq, H, d]; k, v: [Tk, K, d]; Tq ≤ Tk.

    Returns:
        [Tq, H, d], dtype of `q`.
    """
    num_queries, num_keys = q.shape[0], k.shape[0]
    mask = None
    causal = rule.causal and num_queries > 1
    if causal and (num_queries != num_keys or _window_bites(rule, num_keys)):
        mask = visible(num_queries, num_keys, rule, q.device)
        causal = False
    elif not causal and _window_bites(rule, num_keys):
        mask = visible(num_queries, num_keys, rule, q.device)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],  # [1, H, Tq, d]
        k.transpose(0, 1)[None],  # [1, K, Tk, d]
        v.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=causal,
        scale=rule.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


def visible(num_queries: int, num_keys: int, rule: AttentionRule, device: torch.device) -> Tensor:
    """[Tq, Tk] bool: which keys each of the last `num_queries` tokens may see."""
    key = torch.arange(num_keys, device=device)[None, :]
    query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    if rule.causal:
        mask &= key <= query
    if rule.window is not None:
        mask &= key > query - rule.window
    return mask


def reference_attention(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
    """`attend_segment` written out with explicit products, in fp32: the oracle of the tests."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("qhd,khd->hqk", q.to(wide), k.to(wide)) * rule.scale
    mask = visible(q.shape[0], k.shape[0], rule, q.device)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v.to(wide)).to(q.dtype)


def _window_bites(rule: AttentionRule, num_keys: int) -> bool:
    return rule.window is not None and num_keys > rule.window


def _kernel_fits(q: Tensor) -> bool:
    return q.shape[-1] % 16 == 0


class _KernelAttention(torch.autograd.Function):
    """The C kernels: all sequences in one call, with a backward pass several times SDPA's on a CPU."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, lengths: tuple[int, ...]
    ) -> Tensor:
        q, k, v = (x if _heads_contiguous(x) else x.contiguous() for x in (q, k, v))
        kernels = kernels_for(q, k, v)
        assert kernels is not None, "chosen by attention()"
        starts = torch.tensor([0, *lengths]).cumsum(0)
        shape = AttentionShape(
            q.shape[1],
            k.shape[1],
            q.shape[2],
            q.stride(0),
            k.stride(0),
            v.stride(0),
            DTYPE_CODES[q.dtype],
            rule.scale,
            rule.causal,
            rule.window or 0,
        )
        out = torch.empty(q.shape, dtype=q.dtype)
        lse = torch.empty(q.shape[:2])
        kernels.attention_forward(
            *(x.data_ptr() for x in (q, k, v, out, lse, starts)), len(lengths), ctypes.byref(shape)
        )
        ctx.save_for_backward(q, k, v, out, lse, starts)
        ctx.shape = shape
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse, starts = ctx.saved_tensors
        grad = grads[0].contiguous()
        kernels = kernels_for(grad, q, k, v)
        assert kernels is not None, "chosen by attention()"
        grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
        kernels.attention_backward(
            *(x.data_ptr() for x in (grad, q, k, v, out, lse, grad_q, grad_k, grad_v, starts)),
            len(starts) - 1,
            ctypes.byref(ctx.shape),
        )
        return grad_q, grad_k, grad_v, None, None


def _heads_contiguous(x: Tensor) -> bool:
    return x.stride(2) == 1 and x.stride(1) == x.shape[2]
