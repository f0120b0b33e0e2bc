"""The cost of a forward pass under adapters: what `nn.cost` says of the parts, and the adapters' own products."""

from dataclasses import dataclass
from typing import cast

from easyllm.adapters.lora import LoRAConfig
from easyllm.nn import cost
from easyllm.nn.cost import FP32, Activation, LinearShape, kept_bytes
from easyllm.plan.linears import is_adapted


@dataclass(frozen=True, slots=True, kw_only=True)
class Work(cost.Work):
    """What passes through a model, and what of the model is trained.

    Attributes:
        lora: adapters, trained instead of the model.
    """

    lora: LoRAConfig | None = None

    @property
    def trains_all(self) -> bool:
        return self.lora is None


class Tape(cost.CostTrace):
    """Takes down what the parts of a layer and the adapters of its linears do, in order."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)

    def adapter(self, linear: LinearShape, x: Activation, rows: int, name: str) -> bool:
        """`LoRA.forward`: x Aᵀ, then Bᵀ added to the base's output; A and B are cast to the dtype of x."""
        work, lora = self.work, cast("Work", self.work).lora
        if lora is None or not is_adapted(linear, lora):
            return False
        if lora.dropout:
            if x.grad:
                self.keep(f"{name}.noise", x.nbytes)
            x = Activation(f"{name}.dropped", x.nbytes, x.grad)
        down = 2 * rows * linear.in_features * lora.rank
        up = 2 * rows * lora.rank * linear.out_features
        cast_bytes = 0 if work.itemsize == FP32 else work.itemsize * lora.rank * linear.copies
        self.keep_all(x)
        if x.grad:
            self.keep(f"{name}.lora_A", cast_bytes * linear.in_features)
        self.product("adapters", down, down * (1 + x.grad))
        self.keep(f"{name}.inner", rows * lora.rank * work.itemsize)
        self.keep(f"{name}.lora_B", cast_bytes * linear.out_features)
        self.product("adapters", up, 2 * up)
        return True


__all__ = ["Tape", "Work", "kept_bytes"]
