"""Putting adapters into a model's linears, and merging them."""

import re
from collections.abc import Iterator

import torch
from torch import nn

from easyllm.adapters.lora import LoRA, LoRAConfig
from easyllm.core.errors import ConfigError, suggest
from easyllm.nn.decoder import Decoder
from easyllm.nn.linear import Linear

ALL_LINEAR = "all-linear"


def attach(model: Decoder, config: LoRAConfig, *, seed: int = 0) -> Decoder:
    """Freezes the model and gives each target linear a fresh adapter.

    Raises:
        ConfigError: a target names no linear of the model.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for _, linear in target_linears(model, config.targets):
        adapter = LoRA(config, linear.in_features, linear.out_features)
        adapter.reset_parameters(generator)
        linear.adapter = adapter.to(linear.weight.device)
    return model


def target_linears(model: Decoder, targets: tuple[str, ...]) -> list[tuple[str, Linear]]:
    """The linears inside the layers that `targets` names, with their names."""
    linears = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, Linear) and name.startswith("layers.")
    ]
    if ALL_LINEAR in targets:
        return linears
    leaves = {name.rsplit(".", 1)[1] for name, _ in linears}
    for target in targets:
        if target not in leaves:
            raise ConfigError(
                f"adapter target {target!r} names no linear of this model{suggest(target, leaves)}; "
                f"use {ALL_LINEAR} or some of {', '.join(sorted(leaves))}"
            )
    return [(name, module) for name, module in linears if name.rsplit(".", 1)[1] in targets]


def adapted(model: Decoder) -> Iterator[tuple[str, Linear, LoRA]]:
    """Every linear that carries an adapter: its name, itself, the adapter."""
    for name, module in model.named_modules():
        if isinstance(module, Linear) and isinstance(module.adapter, LoRA):
            yield name, module, module.adapter


def adapter_parameters(model: Decoder) -> dict[str, nn.Parameter]:
    """The adapters' parameters by name."""
    return {n: p for n, p in model.named_parameters() if re.search(r"\.adapter\.", n)}


@torch.no_grad()
def merge(model: Decoder) -> Decoder:
    """Adds each adapter to its weight (in fp32, rounded once) and removes it.

    Raises:
        ConfigError: the weights are quantized.
    """
    if model.is_quantized:
        raise ConfigError(
            "an adapter cannot be merged into quantized weights; merge it into the full model, then quantize"
        )
    for _, linear, adapter in list(adapted(model)):
        merged = linear.weight.float() + adapter.delta().to(linear.weight.device)
        linear.weight = nn.Parameter(merged.to(linear.weight.dtype), requires_grad=False)
        linear.adapter = None
    return model


def detach(model: Decoder) -> Decoder:
    """Removes the adapters; the base is as it was."""
    for _, linear, _ in list(adapted(model)):
        linear.adapter = None
    return model
