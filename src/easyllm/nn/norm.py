"""Normalisation of hidden states, computed in fp32 regardless of the input dtype."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from easyllm.nn.config import LayerNormConfig, PartialRMSNormConfig, RMSNormConfig
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

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:  # noqa: ARG002
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

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:  # noqa: ARG002
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

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:  # noqa: ARG002
        """Sets the weight to one and the bias to zero."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class PartialRMSNorm(nn.Module):
    """pRMSNorm: x / √(mean of the first ⌈p D⌉ squares + ε) ⊙ w (arXiv 1910.07467, section 4.2)."""

    def __init__(self, config: PartialRMSNormConfig, width: int) -> None:
        super().__init__()
        self.eps, self.measured = config.eps, math.ceil(width * config.share)
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the normalised `x: [..., width]`, in the dtype of the weights."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = wide[..., : self.measured].square().mean(-1, keepdim=True)
        return (wide * torch.rsqrt(mean + self.eps) * self.weight).to(self.weight.dtype)

    def cost(
        self, trace: CostTrace, x: Activation, name: str, *, rows: int | None = None
    ) -> Activation:
        """Records `x`, its measured dims, the inverse RMS of each row, and the normalised rows."""
        rows, width = trace.work.tokens if rows is None else rows, len(self.weight)
        if x.grad:
            trace.keep_all(x)
            trace.keep(f"{name}.measured", rows * self.measured * FP32)
            trace.keep(f"{name}.inverse", rows * FP32)
            trace.keep(f"{name}.normal", rows * width * FP32)
        return trace.made(name, width, grad=x.grad, rows=rows)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:  # noqa: ARG002
        """Sets the weight to one."""
        nn.init.ones_(self.weight)


class Scale(nn.Module):
    """Multiplies by a constant; part of DeepNorm, N(α x + f(x)) (arXiv 2203.00555, eq. 1).

    α x + f(x) is α times x + f(x) / α, and a norm with ε of the former is one with ε/α² of the
    latter. So the output of a block is scaled, not the residual stream.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Returns `x` times the factor."""
        return x * self.factor

    def cost(self, trace: CostTrace, x: Activation, name: str) -> Activation:  # noqa: ARG002
        """Returns the result; nothing is saved."""
        return Activation(name, x.nbytes, x.grad)


def deep_norm_constants(num_layers: int, *, rule: str = "glm") -> tuple[float, float]:
    """Returns DeepNorm's α, the `residual_scale`, and β, the factor on initial weights.

    Args:
        num_layers: number of layers N.
        rule: `glm` is (2N)^½ and (2N)^-½ (GLM-130B: arXiv 2210.02414, section 2.1), `decoder`
            (2N)^¼ and (8N)^-¼ (DeepNet: arXiv 2203.00555, table 2).

    >>> alpha, beta = deep_norm_constants(70)
    >>> round(alpha, 3), round(beta, 5)
    (11.832, 0.08452)
    """
    if rule == "glm":
        return math.sqrt(2 * num_layers), 1 / math.sqrt(2 * num_layers)
    assert rule == "decoder", f"no rule {rule!r}"
    return (2 * num_layers) ** 0.25, (8 * num_layers) ** -0.25


def build_norm(
    config: RMSNormConfig | PartialRMSNormConfig | LayerNormConfig, width: int
) -> nn.Module:
    """Returns the norm for a configuration."""
    if isinstance(config, PartialRMSNormConfig):
        return PartialRMSNorm(config, width)
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
