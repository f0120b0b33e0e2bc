"""Round-to-nearest quantization (RTN) on uniform grids.

symmetric    scale = max|w| / ((2^b − 1) / 2),  zero = 2^(b − 1)
asymmetric   scale = (max − min) / (2^b − 1),   zero = round(−min / scale),   min ≤ 0 ≤ max

Zero is on either grid. A value differs from its quantized value by at most half a scale, but for
the rounding of the scale itself.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from easyllm.quant.quant_tensor import QuantTensor
from easyllm.quant.spec import QuantSpec

SMALLEST = 2.0**-24
"""Smallest scale, the smallest positive fp16 number."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Scales and zero points [...] of some groups of weights.

    Attributes:
        scales: [...] fp32, representable in the spec's dtype.
        zeros: [...] fp32, whole numbers in 0 .. 2^bits − 1.
        levels: the largest code.
    """

    scales: Tensor
    zeros: Tensor
    levels: int

    def codes(self, weight: Tensor) -> Tensor:
        """Returns the nearest codes of `weight: [..., g]`, fp32 whole numbers."""
        quotients = weight / self.scales[..., None]
        return quotients.round_().add_(self.zeros[..., None]).clamp_(0, self.levels)

    def values(self, codes: Tensor) -> Tensor:
        """Returns the weights [..., g] that `codes: [..., g]` stand for."""
        return (codes - self.zeros[..., None]) * self.scales[..., None]

    def nearest(self, weight: Tensor) -> Tensor:
        """Returns the nearest values on the grid, of `weight: [..., g]`."""
        return self.values(self.codes(weight))


def grid_of(weight: Tensor, spec: QuantSpec) -> Grid:
    """Returns the grids of groups of weights.

    Args:
        weight: [..., g], a group in the last dim.
        spec: bits, symmetry, dtype of scales.
    """
    return grid_between(*weight.float().aminmax(dim=-1), spec)


def grid_between(least: Tensor, most: Tensor, spec: QuantSpec) -> Grid:
    """Returns the grids that span `least` to `most` [...], fp32."""
    if spec.symmetric:
        reach = torch.maximum(-least, most)
        scales = _rounded(reach / (spec.levels / 2), spec)
        return Grid(scales, torch.full_like(scales, spec.middle), spec.levels)
    least, most = least.clamp(max=0), most.clamp(min=0)
    scales = _rounded((most - least) / spec.levels, spec)
    zeros = (-least / scales).round_().clamp_(0, spec.levels)
    return Grid(scales, zeros, spec.levels)


def _rounded(scales: Tensor, spec: QuantSpec) -> Tensor:
    """Rounds scales to the dtype of the file, to positive numbers."""
    most = torch.finfo(spec.torch_scale_dtype).max
    rounded = scales.clamp(SMALLEST, most).to(spec.torch_scale_dtype).float()
    # a group of zeros has any scale; 1 is the plainest
    return torch.where(scales > 0, rounded, torch.ones_like(rounded))


def grouped(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Returns `weight: [N, K]` as [N, G, g], or [1, 1, N · K] for one scale per tensor."""
    if spec.group_size == "tensor":
        return weight.reshape(1, 1, -1)
    groups: Tensor = weight.unflatten(1, (-1, spec.group(weight.shape[1])))
    return groups


def quant_tensor(weight: Tensor, grid: Grid, spec: QuantSpec) -> QuantTensor:
    """Quantizes `weight: [N, K]` to the grids of its groups, of the shape of `grouped` less g."""
    outputs, inputs = weight.shape
    codes = grid.codes(grouped(weight.float(), spec)).view(outputs, inputs).to(torch.uint8)
    scales, zeros = grid.scales, grid.zeros
    if spec.group_size == "tensor":
        scales, zeros = scales.expand(outputs, 1), zeros.expand(outputs, 1)
    return QuantTensor(
        codes=codes, scales=scales.contiguous(), zeros=zeros.to(torch.uint8).contiguous(), spec=spec
    )


@torch.no_grad()
def rtn(weight: Tensor, spec: QuantSpec) -> QuantTensor:
    """Quantizes `weight: [N, K]` to the nearest codes.

    Args:
        weight: [N, K], floating point, finite.
        spec: the grid, whose group size divides K.
    """
    return quant_tensor(weight, grid_of(grouped(weight.float(), spec), spec), spec)


__all__ = ["Grid", "grid_between", "grid_of", "grouped", "quant_tensor", "rtn"]
