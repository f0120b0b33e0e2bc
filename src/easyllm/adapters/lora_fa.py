"""LoRA-FA: LoRA with a frozen random A; only B is trained.

    y = W x + s B A x,   A: [r, in] fixed,  B: [out, r] zero
    (Zhang et al. 2023, arXiv 2308.03303)

The backward pass needs A x, of r numbers a token, but not x. Files are those of LoRA.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from easyllm.adapters.lora import LoRA
from easyllm.adapters.low_rank import LowRankConfig
from easyllm.adapters.registry import register_adapter
from easyllm.nn.cost import Activation, CostTrace, LinearShape


class LoRAFAConfig(LowRankConfig):
    """Rank, scale and targets of LoRA adapters whose A is frozen."""

    kind: Literal["lora_fa"] = "lora_fa"

    def build(self, name: str, in_features: int, out_features: int) -> "LoRAFA":
        """Builds the adapter of one linear with uninitialised parameters."""
        return self.build_as(LoRAFA, name, in_features, out_features)


class LoRAFA(LoRA):
    """The LoRA-FA adapter of one linear; the arguments are those of `LoRA`, and A is a buffer."""

    def add_parameters(self, rank: int, in_features: int, out_features: int) -> None:
        """Adds A, as a buffer, and B, uninitialised."""
        self.register_buffer("lora_A", torch.empty(rank, in_features))
        self.lora_B = nn.Parameter(torch.empty(out_features, rank))

    def cost(
        self, trace: CostTrace, linear: LinearShape, x: Activation, rows: int, name: str
    ) -> None:
        """Records the products of LoRA without the gradient of A."""
        rank = len(self.lora_A)
        down, up = 2 * rows * linear.in_features * rank, 2 * rows * rank * linear.out_features
        cast = trace.cast_bytes(rank * linear.copies)
        if self.dropout is not None:
            x = trace.dropped(x, name)
        if x.grad:
            trace.keep(f"{name}.lora_A", cast * linear.in_features)
        trace.product("adapters", down, down * x.grad)
        trace.keep(f"{name}.inner", rows * rank * trace.work.itemsize)
        trace.keep(f"{name}.lora_B", cast * linear.out_features)
        trace.product("adapters", up, 2 * up)

    def saved_tensors(self) -> Mapping[str, Tensor]:
        """Returns A and B, keyed by their suffixes in peft's file."""
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}


register_adapter(LoRAFAConfig, peft_type="LORA", reads=lambda _: False)

__all__ = ["LoRAFA", "LoRAFAConfig"]
