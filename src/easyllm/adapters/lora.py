"""LoRA: a frozen weight plus a trained product of two thin matrices.

    y = W x + (α / r) B A x,   A: [r, in] Gaussian,  B: [out, r] zero      (Hu et al. 2021, arXiv 2106.09685, eq. 3)

B starts at zero, so the first step sees the base model exactly.
"""

import math
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from easyllm.core.config import Config


class LoRAConfig(Config):
    """Rank, scale and where the adapters go."""

    kind: Literal["lora"] = "lora"
    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    targets: tuple[str, ...] = ("all-linear",)
    """Names of linears (`q_proj`, `down_proj` ...), or `all-linear` for every one inside the layers."""


class LoRA(nn.Module):
    """The adapter of one linear; A and B are fp32, their products run in the dtype of the input."""

    def __init__(self, config: LoRAConfig, in_features: int, out_features: int) -> None:
        super().__init__()
        self.scale = config.alpha / config.rank
        self.lora_A = nn.Parameter(torch.empty(config.rank, in_features))
        self.lora_B = nn.Parameter(torch.empty(out_features, config.rank))
        self.dropout = nn.Dropout(config.dropout) if config.dropout else None

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """A uniform in ±1/√in (PyTorch's linear, as `peft` has it), B zero."""
        bound = 1 / math.sqrt(self.lora_A.shape[1])
        nn.init.uniform_(self.lora_A, -bound, bound, generator=generator)
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """`y + scale · B A x` for `x: [T, in]` and the base's `y: [T, out]`."""
        if self.dropout is not None:
            x = self.dropout(x)
        inner = x @ self.lora_A.to(x.dtype).T  # [T, r]
        return torch.addmm(y, inner, self.lora_B.to(x.dtype).T, alpha=self.scale)

    def delta(self) -> Tensor:
        """[out, in] fp32: what merging adds to the weight."""
        return (self.lora_B.float() @ self.lora_A.float()) * self.scale
