"""All modules of one adapter, the base modules trained with them, and their shared state."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from easyllm.adapters.adapter import Adapter, AdapterConfig, EmbeddingAdapter
from easyllm.adapters.targets import name_matches
from easyllm.core.errors import CheckpointError, ConfigError, suggest
from easyllm.core.json_types import JsonObject

if TYPE_CHECKING:
    from easyllm.nn.decoder import Decoder
    from easyllm.nn.linear import Embedding, Linear


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
        embeddings: the adapted embeddings and their adapter modules, by full name.
        model_adapter: the module of a model-level method (virtual tokens).
        base_parameters: names of the base parameters that are fully trained.

    Attributes:
        name: the name that sequences select it by; empty for an adapter applied to every row.
    """

    def __init__(
        self,
        config: AdapterConfig,
        *,
        linears: "Mapping[str, tuple[Linear, Adapter]]",
        embeddings: "Mapping[str, tuple[Embedding, EmbeddingAdapter]] | None" = None,
        model_adapter: nn.Module | None = None,
        base_parameters: Sequence[str] = (),
        name: str = "",
    ) -> None:
        self.config, self.name = config, name
        self.linears, self.model_adapter = dict(linears), model_adapter
        self.embeddings = dict(embeddings or {})
        self.base_parameters = tuple(base_parameters)
        self.replaced: dict[str, Tensor] = {}
        """Original values of the base parameters that an adapter file has overwritten."""
        self.undo: list[Callable[[], None]] = []
        """Further callbacks that restore the model to its state before the adapter was loaded."""

    @property
    def adapted(self) -> "dict[str, tuple[Linear | Embedding, Adapter | EmbeddingAdapter]]":
        """All adapted layers and their adapter modules, by full name."""
        return {**self.embeddings, **self.linears}

    # ---- training hooks

    def after_backward(self, info: StepInfo) -> None:
        """Called before the optimizer step, once all gradients are accumulated and finite."""

    def after_step(self, info: StepInfo) -> None:
        """Called after the optimizer step."""

    def finish(self) -> bool:
        """Called before the result of a run is evaluated and saved.

        Returns:
            Whether it changed the adapter.
        """
        return False

    def loss(self) -> Tensor | None:
        """Returns an additional scalar term of each step's loss, in nats; None if there is none."""
        return None

    def state(self) -> dict[str, Tensor]:
        """Returns the tensors that a checkpoint stores in addition to the trained parameters.

        By default these are the persistent buffers of the adapter's modules.
        """
        found = dict[str, Tensor]()
        for name, module in self._modules().items():
            parameters = dict(module.named_parameters())
            tensors = module.state_dict()
            found |= {f"{name}.{n}": t for n, t in tensors.items() if n not in parameters}
        return found

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores the tensors that `state` returned.

        Raises:
            CheckpointError: a tensor is missing, or has another shape.
        """
        for name, own in self.state().items():
            if name not in tensors or tensors[name].shape != own.shape:
                raise CheckpointError(
                    f"the checkpoint's adapter state has no {name} of shape {tuple(own.shape)}; "
                    "resume with the recipe that created it, or start in another folder"
                )
            own.copy_(tensors[name])

    def _modules(self) -> dict[str, nn.Module]:
        """Returns all modules of the adapter by the names of the layers they adapt."""
        found: dict[str, nn.Module] = {name: adapter for name, (_, adapter) in self.adapted.items()}
        return found if self.model_adapter is None else found | {"model": self.model_adapter}

    def to_peft(self, modules: Mapping[str, str]) -> JsonObject:
        """Returns the method-specific entries of `adapter_config.json`; see `AdapterConfig`."""
        return self.config.to_peft(modules)

    def own_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters of all modules of the adapter, trained or not."""
        return [p for module in self._modules().values() for p in module.parameters()]

    def trained_parameters(self, model: "Decoder") -> dict[str, nn.Parameter]:
        """Returns the trainable parameters by their names in the model, the adapter's first."""
        own = {id(parameter) for parameter in self.own_parameters()}
        named = dict(model.named_parameters())
        found = {name: p for name, p in named.items() if id(p) in own}
        return found | {name: named[name] for name in named if name in set(self.base_parameters)}

    def rate_factors(self, model: "Decoder") -> dict[str, float]:
        """Returns the factors on the learning rates of the adapter's parameters that are not 1.

        Called before the first step, when matrices that start at zero are recognised by their
        values.
        """
        found = dict[str, float]()
        for name, parameter in self.trained_parameters(model).items():
            if parameter.ndim < 2 or parameter.is_meta or name in self.base_parameters:
                continue
            is_zero = not bool(parameter.detach().any())
            factor = self.config.rate_factor(name, starts_at_zero=is_zero)
            if factor != 1:
                found[name] = factor
        return found

    # ---- files

    def own_tensors(self) -> Mapping[str, Tensor]:
        """Returns the tensors that belong to no linear, by file name (`prompt_embeddings`)."""
        return {} if self.model_adapter is None else dict(self.model_adapter.named_parameters())


def trained_base_parameters(model: "Decoder", config: AdapterConfig) -> tuple[str, ...]:
    """Returns the names of the base parameters that a configuration fully trains, in model order.

    Raises:
        ConfigError: a pattern of `also_trained` matches no module or parameter, or matches a
            quantized weight.
    """
    packed = {
        f"{name}.weight": layer.storage.format
        for name, layer in model.weight_modules()
        if layer.storage.format != "dense"
    }
    names = [*base_parameter_names(model), *packed]
    config.check_base(names)
    around = {".".join(n.split(".")[:k]) for n in names for k in range(1, n.count(".") + 2)}
    for pattern in config.also_trained:
        if not any(name_matches(name, pattern) for name in around):
            raise ConfigError(
                f"also_trained names {pattern!r}, which is not a module with parameters in this "
                f"model{suggest(pattern, around)}"
            )
    found = tuple(name for name in names if config.trains(name))
    for name in found:
        if name in packed:
            raise ConfigError(
                f"{name.removesuffix('.weight')} is quantized ({packed[name]}) and cannot be fully "
                "trained; leave it out of what the adapter trains of its base"
            )
    return found


def base_parameter_names(model: "Decoder") -> list[str]:
    """Returns the names of all parameters of a model except those of attached adapters."""
    slots = (getattr(module, "adapter", None) for module in model.modules())
    held = [slot for slot in (*slots, model.model_adapter) if isinstance(slot, nn.Module)]
    adapters = {id(parameter) for module in held for parameter in module.parameters()}
    return [name for name, p in model.named_parameters() if id(p) not in adapters]


@torch.no_grad()
def restore_base_parameters(model: "Decoder", adapters: AdapterSet) -> None:
    """Restores the base parameters' values from before an adapter file overwrote them."""
    for name, value in adapters.replaced.items():
        model.get_parameter(name).copy_(value)
    adapters.replaced.clear()
