"""All modules of one adapter, the base modules trained with them, and their shared state."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from easyllm.adapters.adapter import Adapter, AdapterConfig
from easyllm.core.errors import ConfigError, suggest

if TYPE_CHECKING:
    from easyllm.nn.decoder import Decoder
    from easyllm.nn.linear import Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInfo:
    """The step of a training run that a hook of an adapter is called in.

    Attributes:
        step: number of steps completed.
        total_steps: number of steps of the run.
        gradient_scale: the factor from `parameter.grad` to the true gradient (1 / loss scale, which
            differs from 1 under fp16).
    """

    step: int
    total_steps: int
    gradient_scale: float = 1.0


class AdapterSet:
    """An attached adapter, as returned by `attach` and `load_adapter`.

    A method with state beyond its modules (a rank budget, shared matrices) registers a subclass.

    Args:
        config: the method's configuration.
        linears: the adapted linears and their adapter modules, by full name.
        model_adapter: the module of a model-level method (virtual tokens).
        whole: base modules that are fully trained, by name.

    Attributes:
        name: the name that sequences select it by; empty for an adapter applied to every row.
    """

    def __init__(
        self,
        config: AdapterConfig,
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
        """Original values of the `whole` modules that an adapter file has overwritten."""
        self.undo: list[Callable[[], None]] = []
        """Further callbacks that restore the model to its state before the adapter was loaded."""

    # ---- training hooks

    def after_backward(self, info: StepInfo) -> None:
        """Called before the optimizer step, once all gradients are accumulated and finite."""

    def after_step(self, info: StepInfo) -> None:
        """Called after the optimizer step."""

    def loss(self) -> Tensor | None:
        """Returns an additional scalar term of each step's loss, in nats; None if there is none."""
        return None

    def state(self) -> dict[str, Tensor]:
        """Returns the tensors that a checkpoint stores in addition to the trained parameters."""
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores the tensors that `state` returned."""

    def trained_parameters(self, model: "Decoder") -> dict[str, nn.Parameter]:
        """Returns the trainable parameters by their names in the model, the adapter's first."""
        own = {id(p) for _, adapter in self.linears.values() for p in adapter.parameters()}
        if self.model_adapter is not None:
            own |= {id(p) for p in self.model_adapter.parameters()}
        base = {id(p) for module in self.whole.values() for p in module.parameters()}
        named = dict(model.named_parameters())
        found = {name: p for name, p in named.items() if id(p) in own}
        return found | {name: p for name, p in named.items() if id(p) in base - own}

    def trained_base_parameters(self) -> set[str]:
        """Returns the names of the base parameters that are trained."""
        return {
            f"{name}.{inner}"
            for name, module in self.whole.items()
            for inner in own_parameters(module)
        }

    # ---- files

    def own_tensors(self) -> dict[str, Tensor]:
        """Returns the tensors that belong to no linear, by file name (`prompt_embeddings`)."""
        return {} if self.model_adapter is None else dict(self.model_adapter.named_parameters())


def find_trained_modules(model: "Decoder", names: tuple[str, ...]) -> dict[str, nn.Module]:
    """Returns the named modules of a model, which are to be fully trained.

    Raises:
        ConfigError: the model has no module with this name, or its weight is quantized.
    """
    modules = dict(model.named_modules())
    packed = {
        name: h.storage.format for name, h in model.weight_modules() if h.storage.format != "dense"
    }
    found = {}
    for name in names:
        has_parameters = name in modules and any(True for _ in modules[name].parameters())
        if not has_parameters and name not in packed:
            raise ConfigError(
                f"also_trained names {name!r}, which is not a module with parameters in this model"
                f"{suggest(name, modules)}"
            )
        inside = [n for n in packed if n == name or n.startswith(f"{name}.")]
        if inside:
            raise ConfigError(
                f"{inside[0]} is quantized ({packed[inside[0]]}) and cannot be fully trained; "
                "leave it out of also_trained"
            )
        found[name] = modules[name]
    return found


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns a module's parameters by name, without those of adapters inside it."""
    slots = (getattr(inner, "adapter", None) for inner in module.modules())
    adapters = {id(p) for a in slots if isinstance(a, nn.Module) for p in a.parameters()}
    return {name: p for name, p in module.named_parameters() if id(p) not in adapters}


@torch.no_grad()
def restore_base_modules(adapters: AdapterSet) -> None:
    """Restores the base modules' values from before an adapter file overwrote them."""
    for name, values in adapters.replaced.items():
        for key, parameter in own_parameters(adapters.whole[name]).items():
            parameter.copy_(values[key])
    adapters.replaced.clear()
