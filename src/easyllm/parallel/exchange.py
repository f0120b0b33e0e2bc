"""Collectives with gradients, for tensor and sequence parallelism.

    f   copy      forward: identity              backward: all-reduce       (Megatron's f)
    g   reduce    forward: all-reduce            backward: identity         (Megatron's g)
        gather    forward: all-gather tokens     backward: reduce-scatter
        scatter   forward: reduce-scatter        backward: all-gather tokens

(Shoeybi et al. 2019, arXiv 1909.08053, section 3; Korthikanti et al. 2022, arXiv 2205.05198,
section 4.2.2)
"""

import torch
from torch import Tensor

from easyllm.ops.autograd import Context
from easyllm.parallel.mesh import Group


def copy(x: Tensor, group: Group) -> Tensor:
    """Returns `x`; its gradient is summed over the ranks."""
    out: Tensor = _Copy.apply(x, group)
    return out


def reduce(x: Tensor, group: Group) -> Tensor:
    """Returns the sum of `x` over the ranks."""
    out: Tensor = _Reduce.apply(x, group)
    return out


def gather(x: Tensor, group: Group) -> Tensor:
    """Returns the ranks' `x: [T / size, ...]` as [T, ...]; its gradient is summed and divided."""
    out: Tensor = _Gather.apply(x, group)
    return out


def scatter(x: Tensor, group: Group) -> Tensor:
    """Returns this rank's rows [T / size, ...] of the sum of `x: [T, ...]` over the ranks."""
    out: Tensor = _Scatter.apply(x, group)
    return out


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.group.all_reduce(grads[0].contiguous().clone()), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, group: Group) -> Tensor:  # noqa: ARG004 - of the interface
        return group.all_reduce(x.contiguous().clone())

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grads[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.all_gather(x)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.group.reduce_scatter(grads[0]), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.reduce_scatter(x)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.group.all_gather(grads[0]), None


__all__ = ["copy", "gather", "reduce", "scatter"]
