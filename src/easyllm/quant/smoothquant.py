"""SmoothQuant: moves the range of activations with outliers into the weights.

(Xiao et al. 2022, arXiv 2211.10438, eq. 4.) s_j = max|x_j|^α / max|w_j|^(1 − α): inputs are divided
by s and columns multiplied by it, so that both can be quantized to 8 bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from easyllm.quant.scaling import ScaleGroup
from easyllm.quant.statistics import Statistics

SMALLEST = 1e-5


@torch.no_grad()
def smoothing_factors(
    group: ScaleGroup, statistics: Sequence[Statistics], alpha: float = 0.5
) -> Tensor:
    """Returns the factors s of a group's channels, [S] fp32.

    Args:
        group: the linears, dense.
        statistics: of each linear's inputs.
        alpha: α, the share of the range that is moved into the weights.
    """
    inputs = torch.stack([its.abs_max for its in statistics]).amax(0)
    columns = [linear.weight.float().abs().amax(0) for linear in group.linears.values()]
    weights = torch.stack(columns).amax(0)
    # a channel that feeds several inputs is smoothed for the largest of them
    reach, widest = (group.gather(values, most=True) for values in (inputs, weights))
    factors = reach.clamp(min=SMALLEST) ** alpha / widest.clamp(min=SMALLEST) ** (1 - alpha)
    return factors.clamp(min=SMALLEST)


__all__ = ["smoothing_factors"]
