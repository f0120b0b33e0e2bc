"""GPTQ on uniform grids (Frantar et al. 2022, arXiv 2210.17323).

Columns are quantized one by one, and those still to come are corrected (`column_correction`). With
a diagonal H nothing is corrected, and on grids that span the weights the result is that of
round-to-nearest.

The paper's grids span the weights of each group. With 3 bits and groups of 64, most of what is lost
is lost there; so each group takes the range that changes its part of the outputs least, by the
diagonal block of H, as AWQ clips.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from easyllm.core.errors import ConfigError
from easyllm.quant.column_correction import BLOCK, checked_hessian, inverse_factor, round_columns
from easyllm.quant.grid_search import best_grid, diagonal_blocks
from easyllm.quant.quant_tensor import QuantTensor
from easyllm.quant.rtn import Grid, grid_of
from easyllm.quant.spec import QuantSpec


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
    weight = weight.detach().float()
    hessian, order = checked_hessian(gram)
    if not options.act_order:
        order = torch.arange(inputs, device=device)
    ordered = hessian[order][:, order]
    static = None
    if _is_static(spec, inputs, options):
        static = _grids(weight, hessian if options.search else None, spec)
    result = _quantize(
        weight.T[order].contiguous(),
        inverse_factor(ordered, options.damping),
        ordered if options.search else None,
        spec,
        static,
        order // spec.group(inputs),
    )
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=device)
    codes[:, order] = result.codes.to(torch.uint8)
    moved = options.act_order and static is None
    group_of = torch.empty_like(order)
    group_of[order] = torch.arange(inputs, device=device) // spec.group(inputs)
    return QuantTensor(
        codes=codes,
        scales=result.grid.scales,
        zeros=result.grid.zeros.to(torch.uint8),
        spec=spec,
        group_of=group_of if moved else None,
    )


def _is_static(spec: QuantSpec, inputs: int, options: GPTQOptions) -> bool:
    """Whether all scales come from the weight before any correction."""
    return spec.group(inputs) == inputs or (options.act_order and options.static_groups)


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
    columns: Tensor,
    factor: Tensor,
    hessian: Tensor | None,
    spec: QuantSpec,
    static: Grid | None,
    groups: Tensor,
) -> _Result:
    """Quantizes the columns from left to right.

    Args:
        columns: [K, N] fp32, columns in the order of quantization; overwritten.
        factor: [K, K] fp32, upper Cholesky factor of H⁻¹ in the same order.
        hessian: [K, K], H in the same order, by which ranges are searched; None searches none.
        spec: the grid.
        static: the grids [N, G] of all groups; None computes each when its first column is reached.
        groups: [K], the column's group in `static`.
    """
    group = spec.group(len(columns))
    # a group is within a block, so that its weights are fully corrected when its grid is computed
    block = max(group, BLOCK // group * group) if static is None else BLOCK
    made: list[Grid] = []

    def round_column(index: int, rest: Tensor) -> tuple[Tensor, Tensor]:
        if static is None and index % group == 0:
            inner = slice(index, index + group)
            block_of = None if hessian is None else hessian[inner, inner]
            made.append(_grids(rest[:group].T, block_of, spec))
        scales, zeros = _column(static, made, int(groups[index]))
        codes = (rest[0] / scales).round_().add_(zeros).clamp_(0, spec.levels)
        return codes, (codes - zeros) * scales

    codes = round_columns(columns, factor, round_column, block=block)
    if static is None:
        scales = torch.cat([grid.scales for grid in made], 1)
        zeros = torch.cat([grid.zeros for grid in made], 1)
        return _Result(codes.T, Grid(scales, zeros, spec.levels))
    return _Result(codes.T, static)


def _column(static: Grid | None, made: list[Grid], group: int) -> tuple[Tensor, Tensor]:
    """Returns the scales and zero points [N] of the next column."""
    if static is None:
        return made[-1].scales[:, 0], made[-1].zeros[:, 0]
    return static.scales[:, group], static.zeros[:, group]


__all__ = ["GPTQOptions", "gptq"]
