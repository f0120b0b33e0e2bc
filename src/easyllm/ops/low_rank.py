"""Low-rank updates of the outputs of linear layers, as LoRA adapters make them.

    y ← y + s B (A x)        A: [r, K], B: [N, r]

The C kernel computes them for several groups of rows, each with its own A and B, in one call, with
the order of sums of the compiled decoding step (kernels/low_rank.h).
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from easyllm.ops.autograd import Context
from easyllm.ops.deterministic import fixed_order_linear, sums_have_fixed_order
from easyllm.ops.kernels import kernels_for
from easyllm.ops.kernels.structs import (
    DTYPE_CODES,
    LowRankUpdate,
    LowRankUpdates,
    Matrix,
    address,
)
from easyllm.ops.matmul import PLAIN


@dataclass(frozen=True, slots=True)
class LowRank:
    """An update s B A of a matrix [N, K].

    Attributes:
        down: A, [r, K].
        up: B, [N, r].
        scale: s.
    """

    down: Tensor
    up: Tensor
    scale: float

    def to(self, dtype: torch.dtype) -> "LowRank":
        """Returns the update with contiguous matrices of another dtype."""
        down, up = (matrix.detach().to(dtype).contiguous() for matrix in (self.down, self.up))
        return LowRank(down, up, self.scale)

    def struct(self) -> LowRankUpdate:
        """Returns the update as the kernels expect it; its matrices must outlive it."""
        if not len(self.down):  # all of its ranks are pruned
            return LowRankUpdate()
        return LowRankUpdate(down=_matrix(self.down), up=_matrix(self.up), scale=self.scale)


def low_rank_update(x: Tensor, y: Tensor, update: LowRank) -> Tensor:
    """Returns y + s B A x; batch-invariant and differentiable.

    Args:
        x: [..., K]; y: [..., N]; of one dtype, in which the products run.
        update: A and B, of any dtype.
    """
    down, up = update.down.to(x.dtype), update.up.to(x.dtype)
    if not len(down):
        return y
    if _kernels(x, y, down, up) is None:
        return y + update.scale * fixed_order_linear(fixed_order_linear(x, down), up)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, y, down, up)):
        out: Tensor = _LowRankUpdate.apply(x, y, down, up, update.scale)
        return out
    return _updated(x, y, LowRank(down, up, update.scale))


def add_low_rank_updates(
    x: Tensor, y: Tensor, updates: Sequence[LowRank], starts: Tensor, rows: Tensor
) -> None:
    """Adds the updates of several groups of rows to y, in place; batch-invariant.

    Args:
        x: [T, K]; y: [T, N]; as `supports_low_rank` requires.
        updates: one for each of G groups.
        starts: [G + 1] int64, the first of each group's rows in `rows`.
        rows: numbers of rows, int64, group by group; a row is in one group at most.
    """
    kernels = _kernels(x, y)
    assert kernels is not None, "supports_low_rank() has been asked"
    cast = [update.to(x.dtype) for update in updates]
    structs = (LowRankUpdate * len(cast))(*(update.struct() for update in cast))
    kernels.low_rank_updates(
        LowRankUpdates(
            x=address(x),
            y=address(y),
            updates=structs,
            starts=address(starts),
            rows=address(rows),
            num_groups=len(cast),
            inputs=x.shape[-1],
            outputs=y.shape[-1],
            dtype=DTYPE_CODES[x.dtype],
        )
    )


def supports_low_rank(x: Tensor, y: Tensor) -> bool:
    """Whether `add_low_rank_updates` supports rows `x: [T, K]` and `y: [T, N]`; not in training."""
    if torch.is_grad_enabled():  # A and B may be trained, even if neither x nor y has a gradient
        return False
    return x.is_contiguous() and y.is_contiguous() and _kernels(x, y) is not None


def _kernels(*tensors: Tensor) -> ctypes.CDLL | None:
    """Returns the C kernels if they support these tensors, else None."""
    dtype = tensors[0].dtype
    if any(t.dtype != dtype or type(t) not in PLAIN for t in tensors):
        return None
    if torch.is_autocast_enabled("cpu") or not sums_have_fixed_order(dtype):
        return None
    return kernels_for(*tensors)


def _updated(x: Tensor, y: Tensor, update: LowRank) -> Tensor:
    x, out = x.contiguous(), y.clone(memory_format=torch.contiguous_format)
    count = x.numel() // max(1, x.shape[-1])
    add_low_rank_updates(x, out, [update], torch.tensor([0, count]), torch.arange(count))
    return out


def _matrix(weight: Tensor) -> Matrix:
    outputs, inputs = weight.shape
    code = DTYPE_CODES[weight.dtype]
    return Matrix(data=address(weight), outputs=outputs, inputs=inputs, format=code)


class _LowRankUpdate(torch.autograd.Function):
    """y + s B A x with the gradient of the two products, whose sums have no fixed order."""

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, y: Tensor, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, down, up)
        ctx.scale = scale
        return _updated(x, y, LowRank(down, up, scale))

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, down, up) = grads, ctx.saved_tensors
        of_x, of_y, of_down, of_up, _ = ctx.needs_input_grad
        rows, scaled = x.reshape(-1, x.shape[-1]), ctx.scale * grad.reshape(-1, grad.shape[-1])
        back = scaled @ up  # s ∂y B, [T, r]
        return (
            (back @ down).view(x.shape) if of_x else None,
            grad if of_y else None,
            back.T @ rows if of_down else None,
            scaled.T @ (rows @ down.T) if of_up else None,
            None,
        )


__all__ = ["LowRank", "add_low_rank_updates", "low_rank_update", "supports_low_rank"]
