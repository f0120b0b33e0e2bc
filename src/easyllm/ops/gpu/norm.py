"""RMS normalization in Triton; the equations are those of `ops/norm`.

A program processes a tile of complete rows: one row of a wide norm, many rows of a per-head norm.
The gradient of the weight is summed over a fixed number of programs, each over its rows in order,
so that it is bitwise independent of the schedule.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096
"""Elements of a tile, if a row is shorter."""
PROGRAMS = 512
"""Programs that share the rows of a backward pass: a few per multiprocessor of a large GPU."""


@triton.jit
def _forward_kernel(
    x,
    added,
    total,
    weight,
    y,
    inverse,
    num_rows,
    width,
    eps,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ADDS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    row_ok, column_ok = rows < num_rows, columns < width
    ok = row_ok[:, None] & column_ok[None, :]
    at = rows.to(tl.int64)[:, None] * width + columns[None, :]
    values = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    if ADDS:
        values += tl.load(added + at, mask=ok, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=ok)
        values = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, axis=1) / width + eps)
    w = tl.load(weight + columns, mask=column_ok, other=0.0).to(tl.float32)
    out = values * scale[:, None] * w[None, :]
    tl.store(y + at, out.to(y.dtype.element_ty), mask=ok)
    tl.store(inverse + rows, scale, mask=row_ok)


@triton.jit
def _backward_kernel(
    grad,
    grad_sum,
    x,
    weight,
    inverse,
    grad_x,
    grad_added,
    partial,
    num_rows,
    width,
    num_programs,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    WITH_WEIGHT: tl.constexpr,
    WITH_SUM: tl.constexpr,
    WITH_ADDED: tl.constexpr,
):
    columns = tl.arange(0, WIDTH)
    column_ok = columns < width
    w = tl.load(weight + columns, mask=column_ok, other=0.0).to(tl.float32)
    total = tl.zeros([WIDTH], dtype=tl.float32)
    for first in range(tl.program_id(0) * ROWS, num_rows, num_programs * ROWS):
        rows = first + tl.arange(0, ROWS)
        row_ok = rows < num_rows
        ok = row_ok[:, None] & column_ok[None, :]
        at = rows.to(tl.int64)[:, None] * width + columns[None, :]
        scale = tl.load(inverse + rows, mask=row_ok, other=0.0)[:, None]
        normal = tl.load(x + at, mask=ok, other=0.0).to(tl.float32) * scale
        out = tl.load(grad + at, mask=ok, other=0.0).to(tl.float32)
        if WITH_WEIGHT:
            total += tl.sum(out * normal, axis=0)
        out = out * w[None, :]
        mean = tl.sum(out * normal, axis=1) / width
        out = (out - normal * mean[:, None]) * scale
        if WITH_SUM:
            out += tl.load(grad_sum + at, mask=ok, other=0.0).to(tl.float32)
        tl.store(grad_x + at, out.to(grad_x.dtype.element_ty), mask=ok)
        if WITH_ADDED:
            tl.store(grad_added + at, out.to(grad_added.dtype.element_ty), mask=ok)
    if WITH_WEIGHT:
        tl.store(partial + tl.program_id(0) * width + columns, total, mask=column_ok)


def rms_norm_forward(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes x + added and its RMS norm.

    Args:
        x: [..., D].
        added: [..., D], or None to normalize `x` itself.
        weight: [D].
        eps: added to the mean square.

    Returns:
        The sum (`x` if `added` is None), its norm in the dtype of `weight`, and 1/r of each row,
        [..., 1] fp32.
    """
    x, weight = x.contiguous(), weight.contiguous()
    total = x
    if added is not None:
        added, total = added.contiguous(), torch.empty_like(x)
    width = x.shape[-1]
    num_rows = x.numel() // width
    y = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    inverse = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    tile = _tile(width)
    _forward_kernel[(triton.cdiv(num_rows, tile["ROWS"]),)](
        *(x, x if added is None else added, total, weight, y, inverse, num_rows, width, eps),
        **tile,
        ADDS=added is not None,
    )
    return total, y, inverse


def rms_norm_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    inverse: Tensor,
    added_dtype: torch.dtype | None = None,
    *,
    with_weight: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Computes the gradients of `rms_norm_forward`.

    Args:
        grad: gradient of the norm, [..., D].
        grad_sum: direct gradient of the sum, or None.
        x: the sum, [..., D].
        weight: [D].
        inverse: 1/r of each row, [..., 1] fp32.
        added_dtype: dtype of the gradient of `added`; None if it is not needed.
        with_weight: whether the gradient of `weight` is needed.

    Returns:
        The gradients of the sum, of `added` in `added_dtype`, and of `weight`; the last two are
        None if not needed.
    """
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    width = x.shape[-1]
    num_rows = x.numel() // width
    tile = _tile(width)
    programs = min(PROGRAMS, triton.cdiv(num_rows, tile["ROWS"]))
    grad_x = torch.empty_like(x)
    rounds = added_dtype not in (None, x.dtype)
    grad_added = torch.empty_like(x, dtype=added_dtype) if rounds else None
    partial = torch.empty(programs if with_weight else 0, width, device=x.device)
    _backward_kernel[(programs,)](
        grad,
        grad if grad_sum is None else grad_sum.contiguous(),
        *(x, weight, inverse, grad_x),
        grad_x if grad_added is None else grad_added,
        *(partial, num_rows, width, programs),
        **tile,
        WITH_WEIGHT=with_weight,
        WITH_SUM=grad_sum is not None,
        WITH_ADDED=rounds,
    )
    if added_dtype == x.dtype:
        grad_added = grad_x
    return grad_x, grad_added, partial.sum(0).to(weight.dtype) if with_weight else None


def _tile(width: int) -> dict[str, int]:
    columns = triton.next_power_of_2(width)
    return {
        "WIDTH": columns,
        "ROWS": max(1, TILE // columns),
        "num_warps": 4 if columns <= TILE else 8 if columns <= 2 * TILE else 16,
    }
