"""GPTQ: quantizes a weight column by column, and corrects the columns that are still to come.

(Frantar et al. 2022, arXiv 2210.17323.) The rounding error of column i, divided by the diagonal of
the upper Cholesky factor U of H⁻¹, is subtracted from the later columns in proportion to row i of
U, which minimises ‖(W' − W) X‖² given the columns that are already quantized. H = X Xᵀ comes from
calibration. With a diagonal H nothing is corrected, and on grids that span the weights the result
is that of round-to-nearest.

The paper's grids span the weights of each group. With 3 bits and groups of 64, most of what is lost
is lost there; so each group takes the range that changes its part of the outputs least, by the
diagonal block of H, as AWQ clips.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from easyllm.core.errors import ConfigError
from easyllm.quant.grid_search import best_grid, diagonal_blocks
from easyllm.quant.quant_tensor import QuantTensor
from easyllm.quant.rtn import Grid, grid_of
from easyllm.quant.spec import QuantSpec

BLOCK = 128
"""Columns that are corrected one by one; later ones are corrected once a block."""
MAX_DAMPING = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTQOptions:
    """Settings of GPTQ.

    Attributes:
        act_order: whether columns are quantized in the order of falling diag(H) (activation order),
            so that those that matter most are corrected least.
        static_groups: with `act_order`, whether groups are those of the original columns, with
            scales from the weight before any correction, so that the file needs no `g_idx`.
        damping: share of the mean of diag(H) that is added to it.
        search: whether the range of each group is searched; otherwise grids span the weights.
    """

    act_order: bool = True
    static_groups: bool = True
    damping: float = 0.01
    search: bool = True


@torch.no_grad()
def gptq(
    weight: Tensor, gram: Tensor, spec: QuantSpec, options: GPTQOptions | None = None
) -> QuantTensor:
    """Quantizes `weight: [N, K]` with GPTQ.

    Args:
        weight: [N, K], floating point, finite.
        gram: [K, K], Σ x xᵀ over the calibration rows; H up to a factor, which does not matter.
        spec: the grid, whose group size divides K; not one scale per tensor.
        options: order of columns and damping.

    Raises:
        ConfigError: the spec has one scale per tensor, or `gram` is not finite.
    """
    options = options or GPTQOptions()
    if spec.group_size == "tensor":
        raise ConfigError(
            "GPTQ quantizes with one scale per row or group, got one per tensor; "
            "set group_size to a number or null"
        )
    inputs, device = weight.shape[1], weight.device
    weight = weight.detach().float().clone()
    hessian = gram.double().clone()
    if not bool(hessian.isfinite().all()):
        raise ConfigError("the calibration statistics contain NaN or Inf; check the model")
    diagonal = hessian.diagonal()
    unused = diagonal == 0  # inputs that are zero in all rows: their weights do not matter
    diagonal[unused] = 1
    order = torch.arange(inputs, device=device)
    if options.act_order:
        order = diagonal.masked_fill(unused, 0).argsort(descending=True, stable=True)
    ordered = hessian[order][:, order]
    factor = _inverse_factor(ordered, options.damping).float()
    static = None
    if _is_static(spec, inputs, options):
        static = _grids(weight, hessian if options.search else None, spec)
    result = _quantize(
        weight[:, order],
        factor,
        ordered if options.search else None,
        spec,
        static,
        order // spec.group(inputs),
    )
    codes = torch.empty_like(result.codes)
    codes[:, order] = result.codes
    moved = options.act_order and static is None
    group_of = torch.empty_like(order)
    group_of[order] = torch.arange(inputs, device=device) // spec.group(inputs)
    return QuantTensor(
        codes=codes.to(torch.uint8),
        scales=result.grid.scales,
        zeros=result.grid.zeros.to(torch.uint8),
        spec=spec,
        group_of=group_of if moved else None,
    )


def _is_static(spec: QuantSpec, inputs: int, options: GPTQOptions) -> bool:
    """Whether all scales come from the weight before any correction."""
    return spec.group(inputs) == inputs or (options.act_order and options.static_groups)


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Returns the upper Cholesky factor of the inverse of H, with more damping where it fails."""
    mean = hessian.diagonal().mean()
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed.item():
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed.item():
            found: Tensor = upper
            return found
        if damping >= MAX_DAMPING:
            raise ConfigError(
                "the calibration statistics are not positive definite; use more calibration text"
            )
        damping = min(max(10 * damping, 1e-4), MAX_DAMPING)


def _grids(columns: Tensor, hessian: Tensor | None, spec: QuantSpec) -> Grid:
    """Returns the grids [N, G] of whole groups.

    Args:
        columns: [N, n], the weights of the groups.
        hessian: [n, n], the part of H of these columns, by which ranges are searched; None takes
            grids that span the weights.
        spec: the grid.
    """
    groups = columns.unflatten(1, (-1, spec.group(columns.shape[1])))
    if hessian is None:
        return grid_of(groups, spec)
    return best_grid(groups, diagonal_blocks(hessian, groups.shape[-1]).float(), spec)


@dataclass(frozen=True, slots=True)
class _Result:
    """Codes [N, K] in the order of columns, and the grids [N, G]."""

    codes: Tensor
    grid: Grid


def _quantize(
    weight: Tensor,
    factor: Tensor,
    hessian: Tensor | None,
    spec: QuantSpec,
    static: Grid | None,
    groups: Tensor,
) -> _Result:
    """Quantizes the columns from left to right; `weight` is overwritten.

    Args:
        weight: [N, K] fp32, columns in the order of quantization.
        factor: [K, K] fp32, upper Cholesky factor of H⁻¹ in the same order.
        hessian: [K, K], H in the same order, by which ranges are searched; None searches none.
        spec: the grid.
        static: the grids [N, G] of all groups; None computes each when its first column is reached.
        groups: [K], the column's group in `static`.
    """
    inputs = weight.shape[1]
    group = spec.group(inputs)
    # a group is within a block, so that its weights are fully corrected when its grid is computed
    block = max(group, BLOCK // group * group) if static is None else BLOCK
    codes = torch.empty_like(weight)
    made: list[Grid] = []
    for first in range(0, inputs, block):
        last = min(first + block, inputs)
        part, errors = weight[:, first:last], torch.empty_like(weight[:, first:last])
        own = factor[first:last, first:last]
        for i in range(last - first):
            if static is None and i % group == 0:
                inner = slice(first + i, first + i + group)
                block_of = None if hessian is None else hessian[inner, inner]
                made.append(_grids(part[:, i : i + group], block_of, spec))
            scales, zeros = _column(static, made, int(groups[first + i]))
            column = part[:, i]
            code = (column / scales).round_().add_(zeros).clamp_(0, spec.levels)
            codes[:, first + i] = code
            error = (column - (code - zeros) * scales) / own[i, i]
            part[:, i + 1 :].addr_(error, own[i, i + 1 :], alpha=-1)
            errors[:, i] = error
        weight[:, last:].addmm_(errors, factor[first:last, last:], alpha=-1)
    if static is None:
        scales = torch.cat([grid.scales for grid in made], 1)
        zeros = torch.cat([grid.zeros for grid in made], 1)
        static = Grid(scales, zeros, spec.levels)
    return _Result(codes, static)


def _column(static: Grid | None, made: list[Grid], group: int) -> tuple[Tensor, Tensor]:
    """Returns the scales and zero points [N] of the next column."""
    if static is None:
        return made[-1].scales[:, 0], made[-1].zeros[:, 0]
    return static.scales[:, group], static.zeros[:, group]


__all__ = ["GPTQOptions", "gptq"]
