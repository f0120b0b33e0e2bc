"""MiSS: one small matrix that every group of inputs shares.

    y = W x + b + Dᵀ Σ_g x_g,   D: [r, out] zero,  x_g the g-th group of r inputs
    (Kang & Yin 2024, arXiv 2409.15371)

The last group is padded with zeros if r does not divide the number of inputs.
"""

from collections.abc import Mapping
from typing import Literal, Self

import torch
from pydantic import Field, PositiveInt
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from easyllm.adapters.adapter import Adapter, AdapterConfig
from easyllm.adapters.file_module import FileModule
from easyllm.adapters.peft_keys import check_keys
from easyllm.adapters.registry import register_adapter
from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.nn.cost import Activation, CostTrace, LinearShape
from easyllm.nn.linear import BaseLinear
from easyllm.ops.deterministic import fixed_order_linear

BLOCK = "miss_block"


class MiSSConfig(AdapterConfig):
    """Rank and targets of MiSS adapters."""

    kind: Literal["miss"] = "miss"
    rank: PositiveInt = Field(default=64, description="Number r of inputs in a group.")
    dropout: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="Dropout probability on the adapter's input in training.",
    )

    def build(self, name: str, in_features: int, out_features: int) -> "MiSS":  # noqa: ARG002
        """Builds the adapter of one linear with uninitialised parameters."""
        return MiSS(self.rank, in_features, out_features, dropout=self.dropout)

    def check(self, name: str, in_features: int, out_features: int) -> None:  # noqa: ARG002
        """Checks that a group is not larger than the input.

        Raises:
            ConfigError: it is.
        """
        if self.rank > in_features:
            raise ConfigError(
                f"adapter.rank={self.rank} is more than the {in_features} inputs of {name}; "
                "lower it, or name the linear in adapter.exclude"
            )

    def to_peft(self, modules: Mapping[str, str]) -> JsonObject:  # noqa: ARG002 - interface
        """Returns the MiSS entries of `adapter_config.json`."""
        return {
            "r": self.rank,
            "miss_dropout": self.dropout,
            "mini_r": 1,
            "bias": "none",
            "init_weights": True,
        }

    @classmethod
    def from_peft(cls, description: JsonMapping, modules: Mapping[str, FileModule]) -> Self:
        """Returns the configuration of a peft MiSS file.

        Raises:
            CheckpointError: an unsupported key changes the result, or a tensor is missing.
        """
        neutral: JsonObject = {"bias": "none", "mini_r": None, "init_weights": (True, False)}
        check_keys(description, honoured=("r", "miss_dropout"), neutral=neutral)
        for module in modules.values():
            if set(module.tensors) != {BLOCK}:
                raise module.unexpected(BLOCK)
        return cls(
            rank=description["r"],
            dropout=description.get("miss_dropout") or 0.0,
            targets=tuple(modules) or ("no linear",),
        )


class MiSS(Adapter):
    """The MiSS adapter of one linear.

    Args:
        rank: r.
        in_features, out_features: shape of the adapted linear.
        dropout: dropout probability on the adapter's input in training.

    Attributes:
        miss_block: D, [r, out] fp32.
    """

    passes_input_unchanged = True
    batch_invariant = True

    def __init__(
        self, rank: int, in_features: int, out_features: int, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.rank, self.in_features, self.padding = rank, in_features, -in_features % rank
        self.miss_block = nn.Parameter(torch.empty(rank, out_features))
        self.dropout = nn.Dropout(dropout) if dropout else None

    def reset_parameters(self, generator: Generator) -> None:  # noqa: ARG002 - all are zero
        """Initialises D to zero."""
        nn.init.zeros_(self.miss_block)

    def forward(self, x: Tensor, base: BaseLinear) -> Tensor:
        """Returns `base(x) + Dᵀ Σ_g x_g`, [..., out] for `x: [..., in]`."""
        y = base(x)
        if self.dropout is not None:
            x = self.dropout(x)
        if self.padding:
            x = F.pad(x, (0, self.padding))
        summed = x.unflatten(-1, (-1, self.rank)).sum(-2)  # [..., r]
        block = self.miss_block.to(x.dtype)
        if base.context is not None and base.context.deterministic:
            return y + fixed_order_linear(summed, block.T.contiguous())
        return torch.addmm(y, summed, block)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns W with Dᵀ added to each group of columns, in fp32, and the unchanged bias."""
        groups, up = self.update_factors()
        return weight + (up @ groups).to(weight.device), bias

    def update_factors(self) -> tuple[Tensor, Tensor]:
        """Returns the matrix [r, in] that sums the groups, and Dᵀ [out, r], in fp32."""
        identity = torch.eye(self.rank, device=self.miss_block.device)
        groups = -(-self.in_features // self.rank)
        return identity.repeat(1, groups)[:, : self.in_features], self.miss_block.float().T

    def cost(
        self, trace: CostTrace, linear: LinearShape, x: Activation, rows: int, name: str
    ) -> None:
        """Records the product with D and the sums that it saves."""
        if self.dropout is not None:
            x = trace.dropped(x, name)
        flops = 2 * rows * self.rank * linear.out_features
        trace.product("adapters", flops, flops * (1 + x.grad))
        trace.keep(f"{name}.sums", rows * self.rank * trace.work.itemsize)
        trace.keep(f"{name}.block", trace.cast_bytes(self.miss_block.numel() * linear.copies))

    def file_tensors(self) -> Mapping[str, nn.Parameter]:
        """Returns D, keyed by its suffix in peft's file."""
        return {BLOCK: self.miss_block}


register_adapter(MiSSConfig, peft_type="MISS")

__all__ = ["MiSS", "MiSSConfig"]
