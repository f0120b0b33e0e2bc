"""DoRA: the update of LoRA with the norm of each output row trained separately.

    y = m / ‖W + s B A‖ · (W + s B A) x + b,   m: [out], initially ‖W‖ (norms over the inputs)
    (Liu et al. 2024, arXiv 2402.09353, eq. 5)

The norm is a constant in the gradient (section 4.3 there). It is computed without a matrix of the
weight's size: ‖w + s b A‖² = ‖w‖² + 2 s b·(A w) + s² b (A Aᵀ) bᵀ for each row w of W and b of B.

Dropout applies to the input of B A alone. peft 0.21.2 also applies it to the input of W in the term
(m / ‖W + s B A‖ - 1) W x; the means are equal, and so is everything without dropout.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor, nn

from easyllm.adapters.lora import LoRA
from easyllm.adapters.low_rank import NEUTRAL, LowRankConfig
from easyllm.adapters.registry import register_adapter
from easyllm.core.json_types import JsonObject
from easyllm.nn.cost import Activation, CostTrace, LinearShape
from easyllm.nn.linear import BaseLinear, Linear
from easyllm.ops.low_rank import LowRank

MAGNITUDE = "lora_magnitude_vector"


class DoRAConfig(LowRankConfig):
    """Rank, scale and targets of DoRA adapters."""

    kind: Literal["dora"] = "dora"

    adapts_embeddings: ClassVar[bool] = False
    suffixes: ClassVar[frozenset[str]] = LowRankConfig.suffixes | {MAGNITUDE}

    def build(self, name: str, in_features: int, out_features: int) -> "DoRA":
        """Builds the adapter of one linear with uninitialised parameters."""
        return self.build_as(DoRA, name, in_features, out_features)

    def to_peft(self, modules: Mapping[str, str]) -> JsonObject:
        """Returns the entries of LoRA with `use_dora`."""
        return {**super().to_peft(modules), "use_dora": True}

    @classmethod
    def neutral_keys(cls) -> JsonObject:
        """Returns peft's keys that the method ignores, with the values they must have."""
        return {**NEUTRAL, "use_dora": True}


class DoRA(LoRA):
    """The DoRA adapter of one linear; the arguments are those of `LoRA`.

    Attributes:
        magnitude: m, [out] fp32.
    """

    row_norms: Tensor | None

    def add_parameters(self, rank: int, in_features: int, out_features: int) -> None:
        """Adds A, B and m, uninitialised."""
        super().add_parameters(rank, in_features, out_features)
        self.magnitude = nn.Parameter(torch.empty(out_features))
        self.register_buffer("row_norms", None, persistent=False)
        self._norms_of: tuple[str, int, torch.dtype] | None = None
        """Format, address and dtype of the weight whose norms are kept: it may be quantized."""

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Initialises A and B as LoRA does, and m to one until `start`."""
        super().reset_parameters(generator)
        nn.init.ones_(self.magnitude)

    @torch.no_grad()
    def start(self, layer: Linear, generator: Generator) -> None:  # noqa: ARG002
        """Initialises m to the norms of the weight's rows."""
        self.magnitude.copy_(layer.storage.dense().float().norm(dim=1))

    def forward(self, x: Tensor, base: BaseLinear) -> Tensor:
        """Returns m / ‖W + s B A‖ · (W x + s B A x) + b, [..., out] for `x: [..., in]`."""
        y = self.updated(x, base(x), base)
        factor = (self.magnitude / self._norm(base)).to(y.dtype)
        if base.layer.bias is None:
            return y * factor
        bias = base.layer.bias.to(y.dtype)
        return torch.addcmul(bias - bias * factor, y, factor)  # y contains the bias once

    @torch.no_grad()
    def _norm(self, base: BaseLinear) -> Tensor:
        """Returns ‖W + s B A‖, the norm of each output row [out] in fp32."""
        with torch.autocast(self.lora_A.device.type, enabled=False):
            return self._row_norms_of_sum(base)

    def _row_norms_of_sum(self, base: BaseLinear) -> Tensor:
        storage = base.layer.storage
        weight = storage.format, storage.payload.data_ptr(), storage.payload.dtype
        kept = self.row_norms  # moved and cast with the module, as if it were a weight
        if kept is None or kept.dtype != torch.float32 or self._norms_of != weight:
            self.row_norms = kept = base.weight.float().norm(dim=1)
            self._norms_of = weight
        down, up = self.lora_A, self.lora_B
        dtype = base.layer.storage.dtype
        inner = base.layer.storage.linear(down.to(dtype)).T.float()  # W Aᵀ, [out, r]
        squares = (up @ (down @ down.T)).mul_(self.scale).add_(inner, alpha=2).mul_(up).sum(1)
        return (kept.square() + self.scale * squares).clamp_min_(1e-24).sqrt()

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns m / ‖W + s B A‖ · (W + s B A) [out, in] in fp32 and the unchanged bias."""
        moved = weight + self.delta().to(weight.device)
        norm = moved.detach().norm(dim=1)
        return moved * (self.magnitude / norm)[:, None], bias

    def update_factors(self) -> tuple[Tensor, Tensor] | None:
        """Returns None: the norm of the updated weight depends on the weight."""
        return None

    def low_rank(self) -> LowRank | None:
        """Returns None: the output is scaled after the update."""
        return None

    def loss_factors(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x' and W' such that x' W'ᵀ is the adapted output."""
        left, right = super().loss_factors(x, weight)
        if self.dropout is None or not self.training:
            return left, right
        norm = (weight.float() + self.delta()).detach().norm(dim=1)
        return left, right * (self.magnitude / norm)[:, None].to(right.dtype)

    def cost(
        self, trace: CostTrace, linear: LinearShape, x: Activation, rows: int, name: str
    ) -> None:
        """Records the products of LoRA, the norm's products, and the rows that m scales."""
        super().cost(trace, linear, x, rows, name)
        rank = len(self.lora_A)
        trace.product("adapters", 2 * linear.weights * rank, 0)
        out = trace.made(f"{name}.updated", linear.out_features, grad=True, rows=rows)
        trace.keep_all(out)
        trace.keep(f"{name}.factor", trace.work.itemsize * linear.out_features * linear.copies)

    def file_tensors(self) -> Mapping[str, nn.Parameter]:
        """Returns A, B and m, keyed by their suffixes in peft's file."""
        return {**super().file_tensors(), MAGNITUDE: self.magnitude}


register_adapter(DoRAConfig, peft_type="LORA", reads=lambda values: bool(values.get("use_dora")))

__all__ = ["DoRA", "DoRAConfig"]
