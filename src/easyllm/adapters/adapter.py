"""What a parameter-efficient method is: a configuration, the module in a linear's slot, and what spans the modules.

A method is one file with one call of `register_adapter`:

    class ScaleConfig(AdapterConfig):
        kind: Literal["scale"] = "scale"
        def build(self, name, in_features, out_features): return Scale(in_features)
    register_adapter(ScaleConfig, peft_type="SCALE")

From then on `adapter: {kind: scale}` trains, resumes, is saved and loaded in peft's layout, merged, planned and served.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field
from torch import Generator, Tensor, nn

from easyllm.core.config import Config
from easyllm.core.errors import CheckpointError, ConfigError
from easyllm.core.kinds import Kinds
from easyllm.nn.config import ModelConfig
from easyllm.nn.cost import Activation, CostTrace, LinearShape
from easyllm.nn.linear import BaseProduct
from easyllm.nn.virtual_tokens import ModelAdapter

if TYPE_CHECKING:
    from easyllm.adapters.adapter_set import AdapterSet

ALL_LINEAR = "all-linear"
NUMBERED = re.compile(r"(^|\.)\d+(\.|$)")
"""A name with a layer's number in it."""


class Adapter(nn.Module):
    """What fills one linear's slot.

    `forward(x, base)` gives the layer's output [..., out] for `x: [..., in]`; `base(x)` is the layer's own product with its
    bias, `base.weight` its weight. The adapter decides whether, and on what, the product is made.

    Attributes:
        keeps_input: whether `base` is called once and with `x` itself, so that layers of one input can share a product.
        batch_invariant: whether a row's bits do not depend on other rows, in deterministic mode (`base.context`).
    """

    keeps_input: bool = False
    batch_invariant: bool = False

    def forward(self, x: Tensor, base: BaseProduct) -> Tensor:
        raise NotImplementedError

    def reset_parameters(self, generator: Generator) -> None:
        """Values to start from: the adapted layer gives what the base gives."""
        raise NotImplementedError

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight [out, in] and bias [out] of a plain linear that gives the same, in fp32 like these."""
        raise NotImplementedError

    def loss_product(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """x' and W' whose product x' W'ᵀ is this adapter's output over a base x Wᵀ: what a loss takes that never holds
        all logits. This one merges.

        Args:
            x: [T, in]; weight: [out, in] of the base, in its own dtype.

        Raises:
            ConfigError: the output is no such product.
        """
        try:
            merged, bias = self.merged(weight.float(), None)
        except NotImplementedError:
            merged, bias = weight, weight
        if bias is not None:
            raise ConfigError(
                "the adapter of lm_head cannot be written as a weight alone, which a loss needs; leave lm_head out of its targets"
            )
        return x, merged.to(weight.dtype)

    def cost(
        self, trace: CostTrace, linear: LinearShape, x: Activation, rows: int, name: str
    ) -> None:
        """Notes in the trace what `forward` runs and keeps besides the base's product. This one takes every matrix for a
        product with all rows; a method that does something else states it.

        Args:
            linear: the adapted layer, or one of several alike that share the rows.
            x: its input; name: prefix of the names of what is kept.
        """
        trace.keep_all(x)
        for own, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue
            flops = 2 * rows * parameter.numel()
            trace.product("adapters", flops, flops * (1 + x.grad))
            inner = min(parameter.shape[0], parameter.shape[1])
            trace.keep(f"{name}.{own}.inner", rows * inner * trace.work.itemsize)
            trace.keep(f"{name}.{own}", trace.cast_bytes(parameter.numel() * linear.copies))

    def file_tensors(self) -> Mapping[str, nn.Parameter]:
        """Its parameters by what follows the linear's name in peft's file (`lora_A.weight`)."""
        raise NotImplementedError


class AdapterConfig(Config):
    """What every method is told. A method overrides `build`, or `build_model_adapter`, and what it states of itself."""

    kind: str
    targets: tuple[str, ...] = Field(default=(ALL_LINEAR,), min_length=1)
    """Names of linears (`q_proj`, `layers.0.mixer.q_proj`), or `all-linear` for every one inside the layers."""
    also_trained: tuple[str, ...] = ()
    """Modules of the base that are trained whole and saved along (`score`, `norm`): peft's `modules_to_save`."""

    level: ClassVar[str] = "linear"
    """`linear` for methods in the slots of linears, `model` for those that add virtual tokens."""

    def adapts(self, name: str) -> bool:
        """Whether the linear of this full name (`layers.0.mixer.q_proj`) has an adapter."""
        if self.level != "linear" or self._is_whole(name):
            return False
        if ALL_LINEAR in self.targets and name.startswith("layers."):
            return True
        return any(name == target or name.endswith(f".{target}") for target in self.targets)

    def _is_whole(self, name: str) -> bool:
        """Whether a linear is trained whole, and so has no adapter (peft's rule, too)."""
        return any(name == whole or name.startswith(f"{whole}.") for whole in self.also_trained)

    def build(self, name: str, in_features: int, out_features: int) -> Adapter:
        """The adapter of one linear, its values not set."""
        raise NotImplementedError

    def build_model_adapter(self, model: ModelConfig) -> ModelAdapter:
        """The adapter of a whole model, its values not set."""
        raise NotImplementedError

    def unsupported_reason(self, format: str) -> str | None:  # noqa: ARG002 - for methods
        """Why the method does not work on weights of a storage format; None if it does."""
        return None

    def merge_unsupported_reason(self) -> str | None:
        """Why the result cannot be merged into the weights; None if it can."""
        return None

    def check(self, name: str, in_features: int, out_features: int) -> None:
        """Refuses a linear that a fresh adapter makes no sense for.

        Raises:
            ConfigError: with the linear's name.
        """

    def check_names(self, names: Sequence[str]) -> None:
        """Refuses a configuration that names something which is not among the adapted linears.

        Raises:
            ConfigError: with what it names.
        """

    def differs_by_layer(self) -> bool:
        """Whether layers of the same shape may have different adapters."""
        return any(NUMBERED.search(name) for name in (*self.targets, *self.also_trained))

    def to_peft(self, modules: Mapping[str, str]) -> dict[str, Any]:  # noqa: ARG002 - for methods
        """The method's own keys of `adapter_config.json`; `modules` are the adapted linears: our names → the file's."""
        return {}

    @classmethod
    def from_peft(
        cls,
        description: Mapping[str, Any],  # noqa: ARG003 - for methods with keys of their own
        modules: Mapping[str, "FileModule"],
    ) -> Self:
        """The configuration that describes a file's adapters, with `targets` naming exactly `modules`.

        Raises:
            CheckpointError: a key changes the result and is not honoured.
        """
        return cls(targets=tuple(modules) or (ALL_LINEAR,))  # type: ignore[call-arg]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileModule:
    """An adapted linear as a file has it.

    Attributes:
        name: the file's, without peft's prefix (`model.layers.0.self_attn.q_proj`).
        tensors: by what follows that name.
    """

    name: str
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterKind:
    """A registered method.

    Attributes:
        peft_type: of `adapter_config.json`.
        adapter_set: the class that holds what spans its modules.
    """

    config: type[AdapterConfig]
    peft_type: str
    adapter_set: "type[AdapterSet]"


ADAPTERS = Kinds("adapter", default="lora")
"""What `adapter:` of a recipe may be."""
_KINDS: dict[str, AdapterKind] = {}


def register_adapter(
    config: type[AdapterConfig],
    *,
    peft_type: str,
    adapter_set: "type[AdapterSet] | None" = None,
) -> None:
    """Makes a method known to recipes, training, files, plans and the engine.

    Args:
        peft_type: what a file of it says; peft's name where peft has the method.
        adapter_set: a subclass with hooks of its own, for a method with state beyond its modules.

    Raises:
        ValueError: its kind or `peft_type` is taken.
    """
    from easyllm.adapters.adapter_set import AdapterSet

    if any(kind.peft_type == peft_type for kind in _KINDS.values()):
        raise ValueError(f"an adapter with peft_type {peft_type!r} is registered already")
    ADAPTERS.register(config)
    name = config.model_fields["kind"].default
    _KINDS[name] = AdapterKind(
        config=config, peft_type=peft_type, adapter_set=adapter_set or AdapterSet
    )


def unregister_adapter(kind: str) -> None:
    """Removes a method: for tests that registered their own."""
    ADAPTERS.unregister(kind)
    del _KINDS[kind]


def kind_of(config: AdapterConfig) -> AdapterKind:
    """The registered method of a configuration."""
    return _KINDS[config.kind]


def kind_of_file(peft_type: object) -> AdapterKind:
    """The method a file names.

    Raises:
        CheckpointError: it is not registered.
    """
    for kind in _KINDS.values():
        if kind.peft_type == peft_type:
            return kind
    known = ", ".join(kind.peft_type for kind in _KINDS.values())
    raise CheckpointError(
        f"the adapter is of peft_type {peft_type!r}, which no method here reads (known are {known}); import the module that "
        "registers it first"
    )


__all__ = [
    "ADAPTERS",
    "ALL_LINEAR",
    "Adapter",
    "AdapterConfig",
    "AdapterKind",
    "FileModule",
    "kind_of",
    "kind_of_file",
    "register_adapter",
    "unregister_adapter",
]
