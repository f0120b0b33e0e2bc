"""Attaching adapters to a model, detaching them, and merging them into the weights."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from easyllm.adapters.adapter import ALL_LINEAR, Adapter, AdapterConfig
from easyllm.adapters.adapter_set import AdapterSet, find_trained_modules, restore_base_modules
from easyllm.adapters.bank import AdapterBank
from easyllm.adapters.registry import kind_of
from easyllm.core.errors import ConfigError, suggest
from easyllm.nn.decoder import Decoder
from easyllm.nn.linear import Linear

if TYPE_CHECKING:
    from easyllm.core.json_types import JsonMapping


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
    if config.level == "linear":
        targets = target_linears(model, config)
        config.check_names([full_name for full_name, _ in targets])
        for full_name, linear in targets:
            config.check(full_name, linear.in_features, linear.out_features)
    adapters = place(model, config, whole=names, generator=torch.Generator().manual_seed(seed))
    model.requires_grad_(False)
    for parameter in adapters.trained_parameters(model).values():
        parameter.requires_grad_(True)
    return adapters


def place(
    model: Decoder,
    config: AdapterConfig,
    *,
    whole: tuple[str, ...] = (),
    name: str = "",
    generator: torch.Generator | None = None,
) -> AdapterSet:
    """Attaches a method's modules to a model; leaves the model unchanged on failure.

    Args:
        model: the model; modified in place.
        config: the method and its settings.
        whole: base modules that are fully trained.
        name: the name that sequences select the adapter by, so that several can be attached;
            without one, the adapter applies to every row.
        generator: initialises the parameters, on the CPU; without one they stay uninitialised.

    Raises:
        ConfigError: as for `attach`.
    """
    _check_free(model, name)
    modules = find_trained_modules(model, whole)
    linears: dict[str, tuple[Linear, Adapter]] = {}
    model_adapter: nn.Module | None = None
    if config.level == "model":
        if name:
            raise ConfigError(
                f"an adapter of kind {config.kind} prepends virtual tokens to every sequence and "
                "cannot be attached by name alongside others; load it alone"
            )
        built: Any = _model_adapter(model, config, generator)
        model_adapter = built
    else:
        for full_name, linear in target_linears(model, config):
            reason = config.unsupported_reason(linear.storage.format)
            if reason is not None:
                raise ConfigError(
                    f"an adapter of kind {config.kind} does not work on {full_name}, which is "
                    f"stored as {linear.storage.format}: {reason}"
                )
            adapter = config.build(full_name, linear.in_features, linear.out_features)
            if generator is not None:
                adapter.reset_parameters(generator)
            adapter.train(model.training)  # new modules start in training mode, with dropout on
            linears[full_name] = linear, adapter.to(linear.storage.device)
    adapters = kind_of(config).adapter_set(
        config, linears=linears, model_adapter=model_adapter, whole=modules, name=name
    )
    for linear, adapter in linears.values():
        if name:
            held: Any = linear.adapter or AdapterBank()
            held.add(name, adapter)
            linear.adapter = held
        else:
            linear.adapter = adapter
    if model_adapter is not None:
        model.model_adapter = built
    model.adapter_sets[name] = adapters
    model.adapter_changes += 1
    return adapters


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


def target_linears(model: Decoder, config: AdapterConfig) -> list[tuple[str, Linear]]:
    """Returns the linears that a configuration adapts, with their full names.

    Raises:
        ConfigError: a target matches no linear.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
    for target in config.targets:
        if target == ALL_LINEAR or any(n == target or n.endswith(f".{target}") for n in linears):
            continue
        leaves = sorted({name.rsplit(".", 1)[-1] for name in linears})
        raise ConfigError(
            f"adapter target {target!r} matches no linear layer of this model"
            f"{suggest(target, leaves)}; use {ALL_LINEAR} or some of {', '.join(leaves)}"
        )
    return [(name, linear) for name, linear in linears.items() if config.adapts(name)]


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


@torch.no_grad()
def merge(model: Decoder, name: str = "") -> Decoder:
    """Merges an adapter into the weights (in fp32, rounded once) and removes it.

    Returns:
        The same model, modified in place.

    Raises:
        ConfigError: there is no such adapter, the method cannot be merged, other named adapters are
            attached, or the weights are quantized.
    """
    adapters = adapter_of(model, name)
    others = [other for other in model.adapter_sets if other != name]
    if others:
        raise ConfigError(
            f"merging {name!r} would change the base of {', '.join(map(repr, others))}; "
            "detach them first"
        )
    reason = adapters.config.merge_unsupported_reason()
    if reason is not None:
        raise ConfigError(f"an adapter of kind {adapters.config.kind} cannot be merged: {reason}")
    for full_name, (linear, _) in adapters.linears.items():
        if linear.storage.format != "dense":
            raise ConfigError(
                f"an adapter cannot be merged into quantized weights ({full_name} is stored as "
                f"{linear.storage.format}); merge it into the unquantized model, then quantize"
            )
    # one linear at a time, so that a failure midway leaves the model equivalent
    for full_name in list(adapters.linears):
        linear, adapter = adapters.linears[full_name]
        bias = None if linear.bias is None else linear.bias.float()
        weight, merged_bias = adapter.merged(linear.weight.float(), bias)
        if merged_bias is not None and linear.bias is None:
            raise ConfigError(
                f"an adapter of kind {adapters.config.kind} adds a bias to {full_name}, which has "
                "none; use the adapter without merging"
            )
        linear.weight = nn.Parameter(weight.to(linear.weight.dtype), requires_grad=False)
        if merged_bias is not None and linear.bias is not None:
            linear.bias = nn.Parameter(merged_bias.to(linear.bias.dtype), requires_grad=False)
        _empty_slot(linear, adapters.name)
        del adapters.linears[full_name]
    adapters.replaced.clear()  # fully trained modules keep their trained values
    adapters.undo.clear()
    _remove(model, adapters)
    return model


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
        restore_base_modules(adapters)
        _remove(model, adapters)
        for undo in reversed(adapters.undo):
            undo()
    return model


def _remove(model: Decoder, adapters: AdapterSet) -> None:
    for linear, _ in adapters.linears.values():
        _empty_slot(linear, adapters.name)
    for module in adapters.whole.values():
        module.requires_grad_(False)
    if adapters.model_adapter is not None:
        model.model_adapter = None
    del model.adapter_sets[adapters.name]
    model.adapter_changes += 1


def _empty_slot(linear: Linear, name: str) -> None:
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
