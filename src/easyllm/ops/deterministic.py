"""Batch-invariant operations: a row's result is bitwise independent of the other rows in the batch.

A GEMM library chooses its kernel, and so its summation order, by the number of rows: `F.linear`
gives a single row different last bits than the same row in a batch of 64. Generated text would then
depend on the other requests being served, and the engine's log-probabilities would differ from
those of the training forward pass. Here every output of a linear layer is a sum in one fixed order,
that of the compiled decoding step, and attention sums over keys in one fixed order. Neither depends
on the number of threads. Row-wise operations (norms, rotations, gates, quantized linears) are
batch-invariant already.
"""

import ctypes

import torch
from torch import Tensor
from torch.nn import functional as F

from easyllm.core.device import bf16_is_fast
from easyllm.ops.attention import attention
from easyllm.ops.attention_rule import AttentionRule
from easyllm.ops.autograd import Context
from easyllm.ops.kernels import kernels_for
from easyllm.ops.kernels.structs import DTYPE_CODES, Matrix, address
from easyllm.ops.matmul import PLAIN
from easyllm.ops.paged_attention import new_pages, paged_attention

TILE_ROWS = 32
PAGE_SIZE = 64


def fixed_order_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns x Wᵀ + b, batch-invariant: each row depends only on its row of `x` and on the weight.

    With the C kernel, an output is the sum of eight lanes, added in a fixed order, and lane i the
    sum over the inputs k with k % 8 = i in ascending order (kernels/dense.c). Without it, and in
    bf16 on a processor with bf16 instructions, which the kernel does not use, PyTorch computes
    tiles of a fixed number of rows (`tiled_linear`).

    Args:
        x: [..., K]; weight: [N, K]; bias: [N] or None.

    Returns:
        [..., N]; differentiable in all operands.

    Raises:
        ValueError: the rows have another length than K.
    """
    if x.shape[-1] != weight.shape[1]:  # the kernel would read beyond the rows
        raise ValueError(f"rows of {x.shape[-1]} values, expected {weight.shape[1]}")
    if _fixed_order_kernels(x, weight) is None:
        return tiled_linear(x, weight, bias)
    operands = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in operands):
        y: Tensor = _FixedOrderLinear.apply(x, weight, bias)
        return y
    return _product(x, weight, bias)


def sums_have_fixed_order(dtype: torch.dtype) -> bool:
    """Whether `fixed_order_linear` uses the C kernel for weights of this dtype on a CPU."""
    if dtype == torch.bfloat16 and bf16_is_fast(torch.device("cpu")):
        return False
    return dtype in DTYPE_CODES and kernels_for() is not None


def tiled_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns x Wᵀ + b, computed in tiles of 32 rows; the last tile is padded with zeros.

    Args:
        x: [..., K]; weight: [N, K]; bias: [N] or None.

    Returns:
        [..., N]; batch-invariant.
    """
    rows = x.reshape(-1, x.shape[-1])
    missing = -len(rows) % TILE_ROWS
    tiles = F.pad(rows, (0, 0, 0, missing)).split(TILE_ROWS)
    parts = [F.linear(tile, weight, bias) for tile in tiles]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out[: len(rows)].view(*x.shape[:-1], weight.shape[0])


def deterministic_attention(
    q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, lengths: tuple[int, ...]
) -> Tensor:
    """Computes `packed_attention`, with the gradient of `ops.attention.attention`.

    Both are the same function up to rounding.
    """
    with torch.no_grad():
        exact = packed_attention(q, k, v, rule, lengths)
    if not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
        return exact
    out: Tensor = _WithValue.apply(attention(q, k, v, rule, lengths), exact)
    return out


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, lengths: tuple[int, ...]
) -> Tensor:
    """Computes `ops.attention.attention` bitwise identically to decoding from a paged KV cache.

    Args:
        q: [T, H, d]; k, v: [T, K, d] of the same tokens; sequences are packed end to end.
        rule: scale, mask and position terms.
        lengths: number of tokens of each sequence, summing to T.

    Returns:
        [T, H, d], dtype of `q`. Rules that the kernel of `paged_attention` does not support use its
        reference, which is not guaranteed to be batch-invariant.
    """
    counts = [-(-length // PAGE_SIZE) for length in lengths]
    starts = torch.tensor([0, *counts]).cumsum(0).tolist()
    widest = max(counts, default=0)
    numbers = torch.arange(widest, dtype=torch.int32)
    table = torch.stack([numbers + start for start in starts[:-1]]) if lengths else numbers[None]
    shape = (starts[-1], k.shape[1], PAGE_SIZE, k.shape[2])
    pages = []
    for x in (k, v):
        store = new_pages(shape, x.dtype)
        assert isinstance(store, Tensor), "pages of a torch dtype are a tensor"
        for start, count, part in zip(starts, counts, x.split(lengths), strict=False):
            filled = F.pad(part, (0, 0, 0, 0, 0, count * PAGE_SIZE - len(part)))
            by_page = filled.view(count, PAGE_SIZE, *part.shape[1:])
            store[start : start + count] = by_page.transpose(1, 2)
        pages.append(store)
    return paged_attention(q, pages[0], pages[1], table, lengths, lengths, rule)


def _fixed_order_kernels(x: Tensor, weight: Tensor) -> ctypes.CDLL | None:
    """Returns the C kernels if they compute the product of `x` and `weight`, else None."""
    if x.dtype != weight.dtype or type(x) not in PLAIN or type(weight) not in PLAIN:
        return None
    if torch.is_autocast_enabled("cpu") or not sums_have_fixed_order(weight.dtype):
        return None
    return kernels_for(x, weight)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    kernels = kernels_for(x, weight)
    assert kernels is not None, "checked by fixed_order_linear()"
    outputs, inputs = weight.shape
    x, weight = x.contiguous(), weight.contiguous()
    wide = None if bias is None else bias.float().contiguous()
    y = x.new_empty(*x.shape[:-1], outputs)
    code = DTYPE_CODES[x.dtype]
    matrix = Matrix(
        data=address(weight), bias=address(wide), outputs=outputs, inputs=inputs, format=code
    )
    kernels.matrix_linear(address(x), address(y), code, x.numel() // inputs, matrix)
    return y


class _FixedOrderLinear(torch.autograd.Function):
    """x Wᵀ + b with the gradient of a linear layer, whose sums have no fixed order."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            grad @ weight if ctx.needs_input_grad[0] else None,
            rows.T @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None,
            rows.sum(0) if ctx.needs_input_grad[2] else None,
        )


class _WithValue(torch.autograd.Function):
    """Returns the second tensor; the gradient flows to the first."""

    @staticmethod
    def forward(_ctx: Context, _differentiable: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(_ctx: Context, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
