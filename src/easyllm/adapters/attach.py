"""Attaching adapters to a model and detaching them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from easyllm.adapters.adapter import Adapter, AdapterConfig, EmbeddingAdapter
from easyllm.adapters.adapter_set import (
    AdapterSet,
    restore_base_parameters,
    trained_base_parameters,
)
from easyllm.adapters.bank import AdapterBank
from easyllm.adapters.registry import kind_of
from easyllm.core.errors import ConfigError
from easyllm.nn.decoder import Decoder
from easyllm.nn.linear import Embedding, Linear

if TYPE_CHECKING:
    from easyllm.core.json_types import JsonMapping
    from easyllm.nn.virtual_tokens import ModelAdapter

EMBEDDING = "embed_tokens"


def attach(
    model: Decoder,
    config: AdapterConfig,
    *,
    seed: int = 0,
    also_trained: Iterable[str] = (),
) -> AdapterSet:
    """Freezes the model and attaches a newly initialised adapter that applies to every row.

    Args:
        model: the base model; modified in place.
        config: the method and its settings.
        seed: random seed of the adapter's initial values.
        also_trained: base modules to fully train, in addition to those that `config` names.

    Raises:
        ConfigError: a target matches no linear of the model, the method does not support the
            weights' storage format, a module to fully train does not exist, or the model already
            has an adapter.
    """
    names = tuple(dict.fromkeys((*config.also_trained, *also_trained)))
    if names != config.also_trained:
        config = config.model_copy(update={"also_trained": names})
    if config.level == "linear":
        targets = target_layers(model, config)
        config.check_names([full_name for full_name, _ in targets])
        for full_name, layer in targets:
            config.check(full_name, *reversed(layer.storage.shape))
    base = trained_base_parameters(model, config)
    generator = torch.Generator().manual_seed(seed)
    adapters = place(model, config, base_parameters=base, generator=generator)
    if not adapters.trained_parameters(model):
        detach(model)
        raise ConfigError(
            f"an adapter of kind {config.kind} has nothing to train: adapter.exclude leaves out "
            "all of its targets; shorten it"
        )
    model.requires_grad_(False)
    for parameter in adapters.trained_parameters(model).values():
        parameter.requires_grad_(True)
    return adapters


def place(
    model: Decoder,
    config: AdapterConfig,
    *,
    base_parameters: Sequence[str] = (),
    name: str = "",
    generator: torch.Generator | None = None,
) -> AdapterSet:
    """Attaches a method's modules to a model; leaves the model unchanged on failure.

    Args:
        model: the model; modified in place.
        config: the method and its settings.
        base_parameters: names of the base parameters that are fully trained.
        name: the name that sequences select the adapter by, so that several can be attached;
            without one, the adapter applies to every row.
        generator: initialises the parameters, on the CPU; without one they stay uninitialised.

    Raises:
        ConfigError: as for `attach`.
    """
    _check_free(model, name)
    built = _Builder(model, config, generator)
    adapters = kind_of(config).adapter_set(
        config,
        linears=built.linears(),
        embeddings=built.embeddings(),
        model_adapter=built.model_adapter(name),
        base_parameters=base_parameters,
        name=name,
    )
    if name and adapters.embeddings:
        raise ConfigError(
            f"the adapter {name!r} changes the token embedding and cannot be attached by name "
            "alongside others; load it alone"
        )
    fill_slots(model, adapters)
    return adapters


def fill_slots(model: Decoder, adapters: AdapterSet) -> None:
    """Puts the modules of an adapter into the slots of the layers that they were built for.

    Raises:
        ConfigError: the model has an adapter with which it cannot be combined.
    """
    _check_free(model, adapters.name)
    for linear, adapter in adapters.linears.values():
        if adapters.name:
            held: Any = linear.adapter or AdapterBank()
            held.add(adapters.name, adapter)
            linear.adapter = held
        else:
            linear.adapter = adapter
    for embedding, table in adapters.embeddings.values():
        embedding.adapter = table
    if adapters.model_adapter is not None:
        model.model_adapter = cast("ModelAdapter", adapters.model_adapter)
    model.adapter_sets[adapters.name] = adapters
    model.adapter_changes += 1


@dataclass(frozen=True, slots=True)
class _Builder:
    """Builds the modules of an adapter for a model, without changing the model."""

    model: Decoder
    config: AdapterConfig
    generator: torch.Generator | None

    def linears(self) -> dict[str, tuple[Linear, Adapter]]:
        """The adapted linears and their adapters."""
        config, found = self.config, dict[str, tuple[Linear, Adapter]]()
        if config.level == "model":
            return found
        for full_name, linear in target_layers(self.model, config):
            if isinstance(linear, Embedding):
                continue
            reason = config.unsupported_reason(linear.storage.format)
            if reason is not None:
                raise ConfigError(
                    f"an adapter of kind {config.kind} does not work on {full_name}, which is "
                    f"stored as {linear.storage.format}: {reason}"
                )
            adapter = config.build(full_name, linear.in_features, linear.out_features)
            if self.generator is not None:
                adapter.reset_parameters(self.generator)
                if linear.storage.device.type != "meta":
                    adapter.start(linear, self.generator)
            adapter.train(self.model.training)  # new modules are in training mode
            found[full_name] = linear, adapter.to(linear.storage.device)
        return found

    def embeddings(self) -> dict[str, tuple[Embedding, EmbeddingAdapter]]:
        """The token embedding and its adapter, if it has one."""
        table, full_name = self.model.embed_tokens, EMBEDDING
        adapter = self.config.build_embedding(full_name, *table.storage.shape)
        if adapter is None:
            return {}
        if self.generator is not None:
            adapter.reset_parameters(self.generator)
            if table.storage.device.type != "meta":
                adapter.start(table, self.generator)
        adapter.train(self.model.training)
        return {full_name: (table, adapter.to(table.storage.device))}

    def model_adapter(self, name: str) -> nn.Module | None:
        """The module of a model-level method."""
        if self.config.level != "model":
            return None
        if name:
            raise ConfigError(
                f"an adapter of kind {self.config.kind} prepends virtual tokens to every sequence "
                "and cannot be attached by name alongside others; load it alone"
            )
        return _model_adapter(self.model, self.config, self.generator)


def _model_adapter(
    model: Decoder, config: AdapterConfig, generator: torch.Generator | None
) -> nn.Module:
    """Builds a model-level adapter on the model's device, initialised if there is a generator."""
    if generator is None:
        built: Any = config.build_for_file(model.config)
    else:
        built = config.build_model_adapter(model.config)
        built.reset_parameters(generator)
    module: nn.Module = built.to(model.device).train(model.training)
    if generator is not None:
        config.start_from_base(module, model, generator)
    return module


def target_layers(model: Decoder, config: AdapterConfig) -> list[tuple[str, Linear | Embedding]]:
    """Returns the layers that a configuration adapts, with their full names.

    Raises:
        ConfigError: a target or an exclusion matches no layer that the method can adapt.
    """
    layers = dict(model.weight_modules())
    config.check_targets(layers)
    return [
        (name, layer)
        for name, layer in layers.items()
        if config.adapts(name) and (config.adapts_embeddings or isinstance(layer, Linear))
    ]


def adapter_of(model: Decoder, name: str = "") -> AdapterSet:
    """Returns the adapter attached under a name, or the unnamed one that applies to every row.

    Raises:
        ConfigError: there is no such adapter.
    """
    if name not in model.adapter_sets:
        held = ", ".join(repr(n) for n in model.adapter_sets if n) or "none"
        what = f"no adapter {name!r}" if name else "no unnamed adapter"
        raise ConfigError(f"the model has {what} (named adapters: {held})")
    found: AdapterSet = model.adapter_sets[name]
    return found


def adapter_parameters(model: Decoder) -> dict[str, nn.Parameter]:
    """Returns the trainable parameters of all adapters, by their names in the model."""
    found: dict[str, nn.Parameter] = {}
    for adapters in model.adapter_sets.values():
        found |= adapters.trained_parameters(model)
    return found


def detach(model: Decoder, name: str | None = None) -> Decoder:
    """Removes one adapter, or all of them, without merging.

    Base modules that an adapter file overwrote are restored. Base modules that were fully trained
    in this process keep their trained values.

    Args:
        model: the model; modified in place.
        name: the adapter to remove (empty for the unnamed one); None removes all.

    Raises:
        ConfigError: there is no adapter with this name.
    """
    chosen = list(model.adapter_sets.values()) if name is None else [adapter_of(model, name)]
    for adapters in chosen:
        restore_base_parameters(model, adapters)
        remove(model, adapters)
        for undo in reversed(adapters.undo):
            undo()
    return model


def remove(model: Decoder, adapters: AdapterSet) -> None:
    """Removes the modules of an attached adapter from the model; values stay as they are."""
    for linear, _ in adapters.linears.values():
        empty_slot(linear, adapters.name)
    for embedding, _ in adapters.embeddings.values():
        embedding.adapter = None
    for name in adapters.base_parameters:
        model.get_parameter(name).requires_grad_(False)
    if adapters.model_adapter is not None:
        model.model_adapter = None
    del model.adapter_sets[adapters.name]
    model.adapter_changes += 1


def empty_slot(linear: Linear, name: str) -> None:
    """Removes an adapter from a linear; the other adapters of its bank stay."""
    if isinstance(linear.adapter, AdapterBank):
        linear.adapter.remove(name)
        if linear.adapter.names:
            return
    linear.adapter = None


def _check_free(model: Decoder, name: str) -> None:
    held: JsonMapping = model.adapter_sets
    if name in held:
        what = f"an adapter {name!r}" if name else "an unnamed adapter"
        raise ConfigError(f"the model already has {what}; detach or merge it first")
    if held and (not name or "" in held):
        raise ConfigError(
            "an unnamed adapter (applied to every row) and named adapters cannot be combined; "
            "give each a name, or detach the others"
        )
