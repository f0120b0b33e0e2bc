"""Normalisation of hidden states, computed in fp32 regardless of the input dtype."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from easyllm.nn.config import LayerNormConfig, RMSNormConfig
from easyllm.nn.cost import FP32, Activation, CostTrace
from easyllm.nn.hooks import has_hooks
from easyllm.ops.norm import add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """RMSNorm: root-mean-square norm over the last dim (arXiv 1910.07467, eq. 4)."""

    def __init__(self, config: RMSNormConfig, width: int) -> None:
        super().__init__()
        self.eps = config.eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the normalised `x: [..., width]`, in the dtype of the weights."""
        return rms_norm(x, self.weight, self.eps)

    def cost(
        self, trace: CostTrace, x: Activation, name: str, *, rows: int | None = None
    ) -> Activation:
        """Records the saved tensors: `x` and the inverse RMS of each row, in fp32."""
        rows = trace.work.tokens if rows is None else rows
        if x.grad:
            trace.keep_all(x)
            trace.keep(f"{name}.inverse", rows * FP32)
        return trace.made(name, len(self.weight), grad=x.grad, rows=rows)

    def reset_parameters(self) -> None:
        """Sets the weight to one."""
        nn.init.ones_(self.weight)


class OffsetRMSNorm(RMSNorm):
    """RMSNorm that stores the weight minus one (Gemma); 1 + w is computed in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the normalised `x: [..., width]`, in the dtype of the weights."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return rms_norm(x, 1 + self.weight.to(wide), self.eps).to(self.weight.dtype)

    def cost(
        self, trace: CostTrace, x: Activation, name: str, *, rows: int | None = None
    ) -> Activation:
        """Records the saved tensors of RMSNorm, and 1 + w in fp32."""
        made = super().cost(trace, x, name, rows=rows)
        if x.grad:
            trace.keep(f"{name}.weight", len(self.weight) * FP32)
        return made

    def reset_parameters(self) -> None:
        """Sets the stored difference to zero."""
        nn.init.zeros_(self.weight)


class LayerNorm(nn.Module):
    """LayerNorm: normalises mean and variance over the last dim (arXiv 1607.06450, eq. 4)."""

    def __init__(self, config: LayerNormConfig, width: int) -> None:
        super().__init__()
        self.eps = config.eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if config.bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Returns the normalised `x: [..., width]`, in the dtype of the weights."""
        wide = torch.promote_types(x.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        out = F.layer_norm(x.to(wide), self.weight.shape, self.weight.to(wide), bias, self.eps)
        return out.to(self.weight.dtype)

    def cost(
        self, trace: CostTrace, x: Activation, name: str, *, rows: int | None = None
    ) -> Activation:
        """Records the saved tensors.

        These are `x` in fp32, each row's mean and inverse standard deviation, and fp32 copies of
        weight and bias if their dtype is narrower.
        """
        rows, width = trace.work.tokens if rows is None else rows, len(self.weight)
        if x.grad:
            wide = rows * width * FP32
            trace.keep(x.name if x.nbytes == wide else f"{name}.wide", wide)
            trace.keep(f"{name}.statistics", 2 * rows * FP32)
            if trace.work.itemsize != FP32:
                trace.keep(f"{name}.weights", (1 + (self.bias is not None)) * width * FP32)
        return trace.made(name, width, grad=x.grad, rows=rows)

    def reset_parameters(self) -> None:
        """Sets the weight to one and the bias to zero."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def build_norm(config: RMSNormConfig | LayerNormConfig, width: int) -> nn.Module:
    """Returns the norm for a configuration."""
    if isinstance(config, LayerNormConfig):
        return LayerNorm(config, width)
    return OffsetRMSNorm(config, width) if config.unit_offset else RMSNorm(config, width)


def sum_and_norm(norm: nn.Module, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns x + added (or x alone) and its norm, as in a residual block.

    Args:
        norm: a norm from `build_norm`, or the identity.
        x: [T, D], the residual stream; added: [T, D] or None.
    """
    if type(norm) is RMSNorm and not has_hooks(norm):
        return add_rms_norm(x, added, norm.weight, norm.eps)
    total = x if added is None else x + added
    return total, norm(total)
