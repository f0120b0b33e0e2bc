"""IA³: trained factors on the keys, the values and the input of the feed-forward's last linear.

y = l ⊙ (W x + b),   l: [out], initially 1     (k_proj, v_proj)
y = W (l ⊙ x) + b,   l: [in], initially 1      (down_proj)
(Liu et al. 2022, arXiv 2205.05638, section 3.3)
"""

from collections.abc import Mapping, Sequence
from typing import Literal, Self

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from easyllm.adapters.adapter import Adapter, AdapterConfig
from easyllm.adapters.file_module import FileModule
from easyllm.adapters.peft_keys import check_keys
from easyllm.adapters.registry import register_adapter
from easyllm.adapters.targets import check_patterns, name_matches
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.nn.cost import Activation, CostTrace, LinearShape
from easyllm.nn.linear import BaseLinear

FACTORS = "ia3_l"


class IA3Config(AdapterConfig):
    """Targets of IA³ adapters, and those of them whose inputs are scaled."""

    kind: Literal["ia3"] = "ia3"
    targets: tuple[str, ...] = Field(
        default=("k_proj", "v_proj", "down_proj"),
        min_length=1,
        description="Linears to scale, named as for other methods.",
    )
    scaled_inputs: tuple[str, ...] = Field(
        default=("down_proj",),
        description="Targets whose inputs are scaled instead of their outputs (peft's "
        "`feedforward_modules`).",
    )

    def scales_input(self, name: str) -> bool:
        """Returns whether the input of the linear with this name is scaled."""
        return any(name_matches(name, pattern) for pattern in self.scaled_inputs)

    def build(self, name: str, in_features: int, out_features: int) -> "IA3":
        """Builds the adapter of one linear with uninitialised parameters."""
        of_input = self.scales_input(name)
        return IA3(in_features if of_input else out_features, of_input=of_input)

    def check_names(self, names: Sequence[str]) -> None:
        """Checks that each pattern of `scaled_inputs` matches an adapted linear.

        Raises:
            ConfigError: one matches none.
        """
        if self.scaled_inputs != IA3Config.model_fields["scaled_inputs"].default:
            what = "adapted linear"
            check_patterns(self.scaled_inputs, names, key="adapter.scaled_inputs", what=what)

    def to_peft(self, modules: Mapping[str, str]) -> JsonObject:
        """Returns the IA³ entries of `adapter_config.json`, by the file's full names."""
        return {
            "target_modules": sorted(modules.values()),
            "feedforward_modules": sorted(
                theirs for ours, theirs in modules.items() if self.scales_input(ours)
            ),
            "fan_in_fan_out": False,
            "init_ia3_weights": True,
        }

    @classmethod
    def from_peft(cls, description: JsonMapping, modules: Mapping[str, FileModule]) -> Self:
        """Returns the configuration of a peft file.

        The shape of a module's factors tells what they scale: [out, 1] or [1, in].

        Raises:
            CheckpointError: an unsupported key changes the result, or a tensor is missing.
        """
        neutral: JsonObject = {
            "feedforward_modules": None,
            "fan_in_fan_out": (True, False),
            "init_ia3_weights": (True, False),
        }
        check_keys(description, honoured=(), neutral=neutral)
        inputs = list[str]()
        for ours, module in modules.items():
            if set(module.tensors) != {FACTORS}:
                raise module.unexpected(FACTORS)
            if module.tensors[FACTORS].shape[-1:] != (1,):
                inputs.append(ours)
        return cls(targets=tuple(modules) or ("no linear",), scaled_inputs=tuple(inputs))


class IA3(Adapter):
    """The IA³ adapter of one linear.

    Args:
        width: number of factors, `in` or `out`.
        of_input: whether they scale the linear's input instead of its output.
    """

    batch_invariant = True

    def __init__(self, width: int, *, of_input: bool) -> None:
        super().__init__()
        self.of_input = of_input
        self.ia3_l = nn.Parameter(torch.empty((1, width) if of_input else (width, 1)))

    @property
    def passes_input_unchanged(self) -> bool:  # type: ignore[override]
        """Whether the linear gets its input unchanged."""
        return not self.of_input

    def reset_parameters(self, generator: Generator) -> None:  # noqa: ARG002 - the factors are 1
        """Initialises all factors to 1."""
        nn.init.ones_(self.ia3_l)

    def forward(self, x: Tensor, base: BaseLinear) -> Tensor:
        """Returns l ⊙ base(x) or base(l ⊙ x), [..., out] for `x: [..., in]`."""
        factors = self.ia3_l.flatten().to(x.dtype)
        return base(x * factors) if self.of_input else base(x) * factors

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns the weight [out, in] with scaled columns or rows; rows scale the bias, too."""
        if self.of_input or bias is None:
            return weight * self.ia3_l, bias
        return weight * self.ia3_l, bias * self.ia3_l.flatten()

    def cost(
        self, trace: CostTrace, linear: LinearShape, x: Activation, rows: int, name: str
    ) -> None:
        """Records the tensor that is scaled, which the gradient of the factors needs."""
        width = linear.in_features if self.of_input else linear.out_features
        scaled = x if self.of_input else trace.made(f"{name}.base", width, grad=True, rows=rows)
        trace.keep_all(scaled)
        trace.keep(f"{name}.factors", trace.cast_bytes(width * linear.copies))

    def file_tensors(self) -> Mapping[str, nn.Parameter]:
        """Returns the factors, keyed by their suffix in peft's file."""
        return {FACTORS: self.ia3_l}


register_adapter(IA3Config, peft_type="IA3")

__all__ = ["IA3", "IA3Config"]
