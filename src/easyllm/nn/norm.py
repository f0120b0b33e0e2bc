"""Normalisation of hidden states, computed in fp32 whatever the dtype that comes in."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from easyllm.nn.config import LayerNormConfig, RMSNormConfig
from easyllm.nn.hooks import has_hooks
from easyllm.ops.norm import rms_norm, sum_and_rms_norm


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


class OffsetRMSNorm(RMSNorm):
    """RMS norm whose stored weight is the difference from one (Gemma); 1 + w is formed in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        """`x: [..., width]` → the same shape, in the dtype of the weights."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return rms_norm(x, 1 + self.weight.to(wide), self.eps).to(self.weight.dtype)

    def reset_parameters(self) -> None:
        """Difference zero."""
        nn.init.zeros_(self.weight)


class LayerNorm(nn.Module):
    """Mean and variance norm over the last dim (arXiv 1607.06450, eq. 4)."""

    def __init__(self, config: LayerNormConfig, width: int) -> None:
        super().__init__()
        self.eps = config.eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if config.bias else None

    def forward(self, x: Tensor) -> Tensor:
        """`x: [..., width]` → the same shape, in the dtype of the weights."""
        wide = torch.promote_types(x.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        out = F.layer_norm(x.to(wide), self.weight.shape, self.weight.to(wide), bias, self.eps)
        return out.to(self.weight.dtype)

    def reset_parameters(self) -> None:
        """Weight one, bias zero."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def build_norm(config: RMSNormConfig | LayerNormConfig, width: int) -> nn.Module:
    """The norm a configuration names."""
    if isinstance(config, LayerNormConfig):
        return LayerNorm(config, width)
    return OffsetRMSNorm(config, width) if config.unit_offset else RMSNorm(config, width)


def sum_and_norm(norm: nn.Module, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x + added (x itself where nothing is added), and its norm: as they stand in a residual block.

    Args:
        norm: what `build_norm` builds, or the identity.
        x: [T, D], the residual stream; added: [T, D] or None.
    """
    if type(norm) is RMSNorm and not has_hooks(norm):
        return sum_and_rms_norm(x, added, norm.weight, norm.eps)
    total = x if added is None else x + added
    return total, norm(total)
