"""Grids narrower than the weights of a group, chosen by what they change in its outputs.

A grid that spans all weights of a group is set by the largest of them; with few bits, one that
clips this weight often changes the outputs less. A group's part of the outputs depends on its own
inputs alone, so the change is e H e, with the group's errors e and its block of H = Σ x xᵀ.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from easyllm.quant.rtn import Grid, grid_between
from easyllm.quant.spec import QuantSpec

RATIOS = tuple(1 - i / 20 for i in range(10))
"""Shares of a group's range that are tried: 1, 0.95 … 0.55."""
ROWS = 512
"""Outputs whose ranges are searched at once."""


def diagonal_blocks(gram: Tensor, size: int) -> Tensor:
    """Returns the diagonal blocks [K / g, g, g] of `gram: [K, K]`, for g = `size`."""
    return torch.stack([gram[i : i + size, i : i + size] for i in range(0, len(gram), size)])


@torch.no_grad()
def best_grid(weight: Tensor, blocks: Tensor, spec: QuantSpec) -> Grid:
    """Returns the grids [N, G] with the smallest Σ ‖(W' − W) x‖², each for its group alone.

    Args:
        weight: [N, G, g], groups of weights.
        blocks: [G, g, g] fp32, the groups' diagonal blocks of Σ x xᵀ.
        spec: bits, symmetry, dtype of scales.
    """
    ranges = [_best_range(part, blocks, spec) for part in weight.float().split(ROWS)]
    least, most = (torch.cat(parts) for parts in zip(*ranges, strict=True))
    return grid_between(least, most, spec)


def _best_range(weight: Tensor, blocks: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Returns the ends [n, G] of the ranges with the smallest errors, for `weight: [n, G, g]`."""
    least, most = weight.aminmax(dim=-1)

    def nearest(ratio: float) -> Tensor:
        return grid_between(least * ratio, most * ratio, spec).nearest(weight)

    found = best_ratio(weight, blocks, nearest, RATIOS)
    return least * found, most * found


def best_ratio(
    weight: Tensor, blocks: Tensor, nearest: Callable[[float], Tensor], ratios: Sequence[float]
) -> Tensor:
    """Returns for each group the ratio [n, G] with the smallest Σ ‖(W' − W) x‖²; 1 if none has one.

    Args:
        weight: [n, G, g] fp32, groups of weights.
        blocks: [G, g, g] fp32, the groups' diagonal blocks of Σ x xᵀ.
        nearest: ratio → W', the nearest values [n, G, g] on the grid of this size.
        ratios: those that are tried; of equal ones the first counts.
    """
    found = torch.ones_like(weight[..., 0])
    smallest = torch.full_like(found, torch.inf)
    for ratio in ratios:
        difference = (nearest(ratio) - weight).transpose(0, 1)  # [G, n, g]
        errors = ((difference @ blocks) * difference).sum(-1).T
        better = errors < smallest
        smallest = torch.where(better, errors, smallest)
        found = found.masked_fill(better, ratio)
    return found


__all__ = ["best_grid", "best_ratio", "diagonal_blocks"]
