"""FlashAttention over packed sequences, PyTorch's own build of it, on a GPU (Dao 2023, arXiv 2307.08691).

All sequences go in one call, with their boundaries; scores never exist in memory. The backward pass sums the gradient of
the queries in a fixed order, so that a run gives the same bits each time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

MOST_DIM = 256
"""Of a head."""
AMPERE = 8
"""The compute capability it needs."""


def flash_fits(*tensors: Tensor) -> bool:
    """Whether queries, keys and values, each [T, heads, d], can be given to it: bf16 or fp16 on a GPU new enough."""
    for x in tensors:
        if x.device.type != "cuda" or x.dtype not in (torch.bfloat16, torch.float16):
            return False
        if x.shape[-1] > MOST_DIM or x.shape[-1] % 8 or _capability(x.device) < AMPERE:
            return False
    return True


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
    """Attention of each packed sequence; its last tokens ask where it has more keys than queries.

    Args:
        q: [T, H, d]; k, v: [U, K, d]; H % K == 0.
        lengths: queries of each sequence, summing to T; key_lengths: keys of each, summing to U.
        window: a query sees its last so many keys, itself included (causal only).

    Returns:
        [T, H, d].
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
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        arguments: tuple[Tensor, Tensor, int, int],
        causal: bool,
        options: dict[str, Any],
    ) -> Tensor:
        out, lse, seed, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, *arguments, 0.0, causal, False, **options
        )
        ctx.save_for_backward(q, k, v, out, lse, seed, unused)
        ctx.arguments, ctx.causal, ctx.options = arguments, causal, options
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v, out, lse, seed, unused = ctx.saved_tensors
        with _one_order():
            grad_q, grad_k, grad_v = torch.ops.aten._flash_attention_backward(
                *(grads[0].contiguous(), q, k, v, out, lse, *ctx.arguments),
                *(0.0, ctx.causal, seed, unused),
                **ctx.options,
            )
        return grad_q, grad_k, grad_v, None, None, None


@contextmanager
def _one_order() -> Iterator[None]:
    """Sums in one order, without touching what the caller has chosen for other operations."""
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


@lru_cache(maxsize=64)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """[S+1] int32, where each sequence begins, and the end; one copy to the device for all layers of a pass."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


@lru_cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]
