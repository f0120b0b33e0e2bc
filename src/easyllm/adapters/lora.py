"""LoRA: a frozen weight plus a trained low-rank update B A.

    y = W x + s B A x,   A: [r, in] uniform,  B: [out, r] zero
    (Hu et al. 2021, arXiv 2106.09685, eq. 3)

The scale s is α / r, or α / √r with rank stabilisation (rsLoRA; Kalajdzievski 2023,
arXiv 2312.03732). B is initialised to zero, so the first step sees exactly the base model.
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from easyllm.adapters.adapter import Adapter
from easyllm.adapters.low_rank import LowRankConfig
from easyllm.adapters.registry import register_adapter
from easyllm.nn.cost import Activation, CostTrace, LinearShape
from easyllm.nn.linear import BaseLinear
from easyllm.ops.low_rank import LowRank, low_rank_update


class LoRAConfig(LowRankConfig):
    """Rank, scale and targets of LoRA adapters."""

    kind: Literal["lora"] = "lora"
    init: Literal["uniform", "gaussian"] = Field(
        default="uniform",
        description="Initial values of A: `uniform` in ±1/√in, or `gaussian` N(0, 1/r²).",
    )

    def build(self, name: str, in_features: int, out_features: int) -> "LoRA":
        """Builds the adapter of one linear with uninitialised parameters."""
        adapter = self.build_as(LoRA, name, in_features, out_features)
        adapter.gaussian = self.init == "gaussian"
        return adapter


class LoRA(Adapter):
    """The LoRA adapter of one linear.

    A and B are stored in fp32; their matrix products (GEMMs) run in the input's dtype.

    Args:
        rank, scale: r and s.
        in_features, out_features: shape of the adapted linear.
        dropout: dropout probability on the adapter's input in training.
    """

    passes_input_unchanged = True
    batch_invariant = True

    def __init__(
        self,
        rank: int,
        scale: float,
        in_features: int,
        out_features: int,
        *,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.gaussian = False
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.add_parameters(rank, in_features, out_features)

    def add_parameters(self, rank: int, in_features: int, out_features: int) -> None:
        """Adds A and B, uninitialised."""
        self.lora_A = nn.Parameter(torch.empty(rank, in_features))
        self.lora_B = nn.Parameter(torch.empty(out_features, rank))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialises A uniformly in ±1/√in (as PyTorch's linear and `peft` do) and B to zero.

        If `gaussian` is set, A is drawn from N(0, 1/r²) instead, as `peft` does for `gaussian`.
        """
        rank, width = self.lora_A.shape
        if self.gaussian:
            nn.init.normal_(self.lora_A, std=1 / rank, generator=generator)
        else:
            bound = 1 / math.sqrt(width)
            nn.init.uniform_(self.lora_A, -bound, bound, generator=generator)
        nn.init.zeros_(self.lora_B)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Returns A [r, in] and B [out, r] of the update s B A, in fp32."""
        return self.lora_A, self.lora_B

    def forward(self, x: Tensor, base: BaseLinear) -> Tensor:
        """Returns `base(x) + s · B A x` [..., out] for `x: [..., in]`."""
        return self.updated(x, base(x), base)

    def updated(self, x: Tensor, y: Tensor, base: BaseLinear) -> Tensor:
        """Returns `y + s · B A x` [..., out] for `x: [..., in]` and `y: [..., out]`."""
        if self.dropout is not None:
            x = self.dropout(x)
        if base.context is not None and base.context.deterministic:
            return low_rank_update(x, y, LowRank(*self.matrices(), self.scale))
        down, up = (matrix.to(x.dtype) for matrix in self.matrices())
        inner = x @ down.T  # [T, r]
        return torch.addmm(y, inner, up.T, alpha=self.scale)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns W + s B A [out, in] in fp32 and the unchanged bias."""
        return weight + self.delta().to(weight.device), bias

    def update_factors(self) -> tuple[Tensor, Tensor] | None:
        """Returns A [r, in] and s B [out, r] in fp32."""
        down, up = self.matrices()
        return down.float(), self.scale * up.float()

    def low_rank(self) -> LowRank | None:
        """Returns A [r, in], B [out, r] and s; None while dropout changes the input."""
        if self.dropout is not None and self.training:
            return None
        return LowRank(*self.matrices(), self.scale)

    def loss_factors(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x' and W' such that x' W'ᵀ is the adapted output.

        Dropout applies to the adapter's input only, so with dropout the two factors are the
        concatenations [x, drop(x) Aᵀ] and [W, s B] along the last axis.
        """
        if self.dropout is None or not self.training:
            return super().loss_factors(x, weight)
        down, up = self.matrices()
        inner = self.dropout(x) @ down.to(x.dtype).T
        up = (self.scale * up).to(weight.dtype)
        return torch.cat([x, inner], dim=1), torch.cat([weight, up], dim=1)

    def delta(self) -> Tensor:
        """Returns s B A [out, in] in fp32, which merging adds to the weight."""
        down, up = self.matrices()
        return (up.float() @ down.float()) * self.scale

    def cost(
        self, trace: CostTrace, linear: LinearShape, x: Activation, rows: int, name: str
    ) -> None:
        """Records the GEMMs x Aᵀ and (x Aᵀ) Bᵀ, and the casts of A and B to the dtype of x."""
        rank = len(self.matrices()[0])
        if self.dropout is not None:
            x = trace.dropped(x, name)
        down, up = 2 * rows * linear.in_features * rank, 2 * rows * rank * linear.out_features
        cast = trace.cast_bytes(rank * linear.copies)
        trace.keep_all(x)
        if x.grad:
            trace.keep(f"{name}.lora_A", cast * linear.in_features)
        trace.product("adapters", down, down * (1 + x.grad))
        trace.keep(f"{name}.inner", rows * rank * trace.work.itemsize)
        trace.keep(f"{name}.lora_B", cast * linear.out_features)
        trace.product("adapters", up, 2 * up)

    def file_tensors(self) -> Mapping[str, nn.Parameter]:
        """Returns A and B, keyed by their suffixes in peft's file."""
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}


register_adapter(LoRAConfig, peft_type="LORA")

__all__ = ["LoRA", "LoRAConfig"]
