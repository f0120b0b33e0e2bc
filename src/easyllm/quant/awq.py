"""AWQ: factors per input channel that protect the weights of large activations, and clipping.

(Lin et al. 2023, arXiv 2306.00978.) The columns of a weight are multiplied by s before
quantization and the module before it is divided by s; s = a^r with a the mean magnitude of each
input and r the one of 0, 1/20 … 19/20 with the smallest error of the outputs on calibration text.
r = 0 is round-to-nearest, so the error is never larger than its. Then each group's range is clipped
where that makes the error of its part of the output smaller.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from easyllm.quant.grid_search import best_grid, diagonal_blocks
from easyllm.quant.quant_tensor import QuantTensor
from easyllm.quant.rtn import grid_of, grouped, quant_tensor
from easyllm.quant.scaling import ScaleGroup
from easyllm.quant.spec import QuantSpec
from easyllm.quant.statistics import Statistics, output_error

STEPS = 20
"""Exponents tried."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """The factors found for a group.

    Attributes:
        factors: [S] fp32.
        exponent: r.
        error: Σ ‖(W' − W) x‖² with these factors.
        rtn_error: the same at r = 0.
    """

    factors: Tensor
    exponent: float
    error: float
    rtn_error: float


@torch.no_grad()
def find_factors(group: ScaleGroup, statistics: Sequence[Statistics], spec: QuantSpec) -> Scaling:
    """Returns the factors with the smallest error of the outputs of a group's linears.

    Args:
        group: the linears, dense.
        statistics: of each linear's inputs, with `gram`.
        spec: the grid that the linears will be quantized to.
    """
    weights = [linear.weight.float() for linear in group.linears.values()]
    rows = sum(its.rows for its in statistics)
    total = torch.stack([its.abs_sum for its in statistics]).sum(0) / max(rows, 1)
    magnitude = group.gather(total).clamp(min=1e-4)
    best: Scaling | None = None
    for step in range(STEPS):
        factors = magnitude ** (step / STEPS)
        factors = factors / (factors.max() * factors.min()).sqrt()
        columns = group.spread(factors)
        error = 0.0
        for weight, its in zip(weights, statistics, strict=True):
            assert its.gram is not None, "AWQ needs the Gram matrix"
            scaled = grouped(weight * columns, spec)
            rounded = grid_of(scaled, spec).nearest(scaled).view_as(weight) / columns
            error += float(output_error(rounded - weight, its.gram))
        if best is None:
            best = Scaling(factors, 0.0, error, error)
        elif error < best.error:
            best = Scaling(factors, step / STEPS, error, best.rtn_error)
    assert best is not None, "r = 0 is tried"
    return best


@torch.no_grad()
def clipped(weight: Tensor, gram: Tensor, spec: QuantSpec) -> QuantTensor:
    """Quantizes `weight: [N, K]` on the range of each group that loses least in its outputs.

    Args:
        weight: [N, K], floating point, finite.
        gram: [K, K], Σ x xᵀ of the inputs.
        spec: the grid; one scale per tensor is not clipped.
    """
    weight = weight.float()
    if spec.group_size == "tensor":
        return quant_tensor(weight, grid_of(grouped(weight, spec), spec), spec)
    blocks = diagonal_blocks(gram, spec.group(weight.shape[1]))
    return quant_tensor(weight, best_grid(grouped(weight, spec), blocks, spec), spec)


__all__ = ["Scaling", "clipped", "find_factors"]
