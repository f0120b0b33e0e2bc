"""PyTorch's FlashAttention over packed sequences on a GPU (Dao 2023, arXiv 2307.08691).

All sequences are computed in one variable-length call, which takes their boundaries (cu_seqlens);
the score matrix is never materialized. The backward pass accumulates the gradient of the queries in
a fixed order, so that runs are bitwise reproducible.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from easyllm.ops.autograd import Context


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
) -> Tensor:
    """Computes attention within each packed sequence.

    Where a sequence has more keys than queries, the queries are its last tokens.

    Args:
        q: [T, H, d]; k, v: [U, K, d]; H % K == 0.
        lengths: number of queries of each sequence, summing to T.
        key_lengths: number of keys of each sequence, summing to U.
        scale: factor of the scores.
        causal: whether a query sees only keys up to its own position.
        window: number of most recent keys that a query sees, its own included (causal only).

    Returns:
        [T, H, d], dtype of `q`.
    """
    arguments = (
        _bounds(lengths, q.device),
        _bounds(key_lengths, q.device),
        max(lengths),
        max(key_lengths),
    )
    options = {
        "scale": scale,
        "window_size_left": -1 if window is None else window - 1,
        "window_size_right": -1 if window is None else 0,
    }
    out: Tensor = _Flash.apply(q, k, v, arguments, causal, options)
    return out


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        arguments: tuple[Tensor, Tensor, int, int],
        causal: bool,
        options: dict[str, Any],
    ) -> Tensor:
        out: Tensor
        out, lse, seed, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, *arguments, 0.0, causal, False, **options
        )
        ctx.save_for_backward(q, k, v, out, lse, seed, unused)
        ctx.arguments, ctx.causal, ctx.options = arguments, causal, options
        return out

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v, out, lse, seed, unused = ctx.saved_tensors
        with _deterministic_algorithms():
            grad_q, grad_k, grad_v = torch.ops.aten._flash_attention_backward(
                *(grads[0].contiguous(), q, k, v, out, lse, *ctx.arguments),
                *(0.0, ctx.causal, seed, unused),
                **ctx.options,
            )
        return grad_q, grad_k, grad_v, None, None, None


@contextmanager
def _deterministic_algorithms() -> Iterator[None]:
    """Enables deterministic algorithms, then restores the caller's setting."""
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


@lru_cache(maxsize=64)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns cu_seqlens, [S+1] int32: the start of each sequence, then the total length.

    It is cached, so that all layers of a pass share one copy to the device.
    """
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
