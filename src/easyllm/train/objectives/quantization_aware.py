"""Quantization-aware training: next-token prediction with weights that are rounded on the fly.

The forward pass uses the quantized weights Q(W), and the backward pass ignores the rounding
(straight-through, Bengio et al. 2013, arXiv 1308.3432):

    W' = W + stop_gradient(Q(W) − W)

The full weights are trained and saved; quantized afterwards to the same grid, by rounding to
nearest, they give the model that was trained.
"""

from typing import Literal

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor

from easyllm.core.errors import ConfigError
from easyllm.nn.decoder import Decoder
from easyllm.nn.linear import Linear
from easyllm.nn.moe import ROUTERS
from easyllm.nn.storage import DenseWeight
from easyllm.ops.deterministic import fixed_order_linear
from easyllm.ops.kernels.structs import Matrix
from easyllm.ops.matmul import linear
from easyllm.quant.rtn import rtn
from easyllm.quant.spec import QuantSpec
from easyllm.train.data_config import CorpusDataConfig, DataConfig
from easyllm.train.objectives.language_model import LanguageModel, LanguageModelConfig
from easyllm.train.objectives.objective import register_objective


class QuantizationAwareConfig(LanguageModelConfig):
    """Next-token prediction with weights that are quantized on the fly (QAT)."""

    kind: Literal["quantization_aware"] = "quantization_aware"  # type: ignore[assignment]
    bits: Literal[2, 3, 4, 8] = Field(default=4, description="Bits per weight.")
    group_size: NonNegativeInt = Field(
        default=64, description="Inputs that share a scale; 0 is one scale per output row."
    )
    asymmetric: bool = Field(
        default=False,
        description="Grids that span the minimum to the maximum of a group, with zero points.",
    )

    @property
    def spec(self) -> QuantSpec:
        """The grid."""
        return QuantSpec(
            bits=self.bits, group_size=self.group_size or None, symmetric=not self.asymmetric
        )


class StraightThroughWeight(DenseWeight):
    """A full weight of a layer that is quantized in every product; its gradient ignores that.

    Args:
        layer: the layer, whose parameter `weight` is what is trained and saved.
        spec: the grid.
    """

    def __init__(self, layer: Linear, spec: QuantSpec) -> None:
        super().__init__(layer._parameters)
        self.spec = spec

    def dense(self) -> Tensor:
        """Returns W + stop_gradient(Q(W) − W), [N, K]."""
        weight = self.weight
        with torch.no_grad():
            quantized = rtn(weight.detach(), self.spec).dequantize().to(weight.dtype)
        return weight + (quantized - weight).detach()

    def linear(
        self, x: Tensor, bias: Tensor | None = None, *, deterministic: bool = False
    ) -> Tensor:
        """Returns x Q(W)ᵀ + b, [..., N] for `x: [..., K]`."""
        return (fixed_order_linear if deterministic else linear)(x, self.dense(), bias)

    def rows(self, token_ids: Tensor) -> Tensor:
        """Returns the quantized weight's rows `token_ids: [T]`, [T, K]."""
        return self.dense()[token_ids]

    def kernel_matrix(self, bias: Tensor | None) -> Matrix | None:  # noqa: ARG002 - interface
        """Returns None: the C kernels would use the full weight."""
        return None


class QuantizationAware(LanguageModel):
    """The loss of a model whose linears inside the layers are quantized in every product."""

    def __init__(self, config: QuantizationAwareConfig) -> None:
        super().__init__(config)
        self.spec = config.spec

    def prepare_model(self, model: Decoder, *, seed: int) -> Decoder:  # noqa: ARG002 - interface
        """Returns the model, its linears quantized on the fly.

        Raises:
            ConfigError: a weight is quantized already, or its width does not suit the grid.
        """
        for name, layer in model.layers.named_modules(prefix="layers"):
            if not isinstance(layer, Linear) or name.endswith(ROUTERS):
                continue
            reason = self.spec.unsupported_reason(layer.in_features)
            if layer.storage.format != "dense":
                reason = f"it is stored as {layer.storage.format}"
            if reason is not None:
                raise ConfigError(f"{name} cannot be trained with quantization: {reason}")
            layer.storage = StraightThroughWeight(layer, self.spec)
        return model


register_objective(
    QuantizationAwareConfig,
    build=QuantizationAware,
    data=(DataConfig, CorpusDataConfig),
    needs_full_weights=True,
)

__all__ = ["QuantizationAware", "QuantizationAwareConfig", "StraightThroughWeight"]
