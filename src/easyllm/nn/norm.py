"""Normalisation of hidden states, computed in fp32 whatever the dtype that comes in."""

import torch
from torch import Tensor, nn

from easyllm.nn.config import RMSNormConfig
from easyllm.ops.norm import rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim (arXiv 1910.07467, eq. 4)."""

    def __init__(self, config: RMSNormConfig, width: int) -> None:
        super().__init__()
        self.eps = config.eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """`x: [..., width]` → the same shape, in the dtype of the weights."""
        return rms_norm(x, self.weight, self.eps)

    def reset_parameters(self) -> None:
        """Weight one."""
        nn.init.ones_(self.weight)


def build_norm(config: RMSNormConfig, width: int) -> nn.Module:
    """The norm a configuration names."""
    return RMSNorm(config, width)
