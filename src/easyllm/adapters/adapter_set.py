"""An adapter as a whole: the modules in a model's slots, what of the base is trained with them, and what spans them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from easyllm.core.errors import ConfigError, suggest

if TYPE_CHECKING:
    from easyllm.adapters.adapter import Adapter, AdapterConfig
    from easyllm.nn.decoder import Decoder
    from easyllm.nn.linear import Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainProgress:
    """Where a training run stands: `step` steps of `total_steps` are done.

    `gradient_scale`: a parameter's gradient is `parameter.grad` times this (under fp16 losses are scaled up).
    """

    step: int
    total_steps: int
    gradient_scale: float = 1.0


class AdapterSet:
    """What `attach` and `load_adapter` give. A method with state beyond its modules (a budget, shared matrices) registers a
    subclass.

    Args:
        config: of the method.
        linears: the adapted linears by their full names, with their adapters.
        model_adapter: of a method that acts on the model as a whole.
        whole: modules of the base that are trained whole, by name.

    Attributes:
        name: under which it is held besides others; empty for an adapter of every row.
    """

    def __init__(
        self,
        config: "AdapterConfig",
        *,
        linears: "Mapping[str, tuple[Linear, Adapter]]",
        model_adapter: nn.Module | None = None,
        whole: Mapping[str, nn.Module] | None = None,
        name: str = "",
    ) -> None:
        self.config, self.name = config, name
        self.linears, self.model_adapter = dict(linears), model_adapter
        self.whole = dict(whole or {})
        self.replaced: dict[str, dict[str, Tensor]] = {}
        """Values of `whole` modules before a file's took their place."""
        self.undo: list[Callable[[], None]] = []
        """What else gives the model back as it was before the adapter was loaded."""

    # ---- what a run asks

    def after_backward(self, progress: TrainProgress) -> None:
        """Called when all gradients of a step are there and finite, before the step is taken."""

    def after_step(self, progress: TrainProgress) -> None:
        """Called when a step has been taken."""

    def loss(self) -> Tensor | None:
        """A further term of each step's loss, in nats; None where there is none."""
        return None

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps besides the trained parameters."""
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes back what `state` gave."""

    def trained_parameters(self, model: "Decoder") -> dict[str, nn.Parameter]:
        """The parameters that are trained, by their names in the model: the adapter's, then the base's."""
        own = {id(p) for _, adapter in self.linears.values() for p in adapter.parameters()}
        if self.model_adapter is not None:
            own |= {id(p) for p in self.model_adapter.parameters()}
        base = {id(p) for module in self.whole.values() for p in module.parameters()}
        named = dict(model.named_parameters())
        found = {name: p for name, p in named.items() if id(p) in own}
        return found | {name: p for name, p in named.items() if id(p) in base - own}

    def whole_parameters(self) -> set[str]:
        """Names of the base's parameters that are trained."""
        return {
            f"{name}.{inner}"
            for name, module in self.whole.items()
            for inner in own_parameters(module)
        }

    # ---- files

    def own_tensors(self) -> dict[str, nn.Parameter]:
        """Tensors of the file that belong to no linear, by their names there (`prompt_embeddings`)."""
        return {} if self.model_adapter is None else dict(self.model_adapter.named_parameters())


def find_whole(model: "Decoder", names: tuple[str, ...]) -> dict[str, nn.Module]:
    """The modules of a model that are to be trained whole.

    Raises:
        ConfigError: a name is none of the model's modules, or its weight is quantized.
    """
    modules = dict(model.named_modules())
    packed = {name: h.storage.format for name, h in model.holders() if h.storage.format != "dense"}
    found = {}
    for name in names:
        has_parameters = name in modules and any(True for _ in modules[name].parameters())
        if not has_parameters and name not in packed:
            raise ConfigError(
                f"also_trained names {name!r}, which is no module of this model with parameters"
                f"{suggest(name, modules)}"
            )
        inside = [n for n in packed if n == name or n.startswith(f"{name}.")]
        if inside:
            raise ConfigError(
                f"{inside[0]} is quantized ({packed[inside[0]]}) and cannot be trained whole; leave it out of also_trained"
            )
        found[name] = modules[name]
    return found


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's parameters but for those of the adapters inside it, by their names in it."""
    slots = (getattr(inner, "adapter", None) for inner in module.modules())
    adapters = {id(p) for a in slots if isinstance(a, nn.Module) for p in a.parameters()}
    return {name: p for name, p in module.named_parameters() if id(p) not in adapters}


@torch.no_grad()
def restore_whole(adapters: AdapterSet) -> None:
    """Gives the base's modules the values they had before a file's took their place."""
    for name, values in adapters.replaced.items():
        for key, parameter in own_parameters(adapters.whole[name]).items():
            parameter.copy_(values[key])
    adapters.replaced.clear()
