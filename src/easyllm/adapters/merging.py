"""Merging adapters into the weights of a model."""

import torch
from torch import nn

from easyllm.adapters.attach import adapter_of, empty_slot, remove
from easyllm.core.errors import ConfigError
from easyllm.nn.decoder import Decoder


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
    for full_name, (layer, _) in adapters.adapted.items():
        if layer.storage.format != "dense":
            raise ConfigError(
                f"an adapter cannot be merged into quantized weights ({full_name} is stored as "
                f"{layer.storage.format}); merge it into the unquantized model, then quantize"
            )
    # one layer at a time, so that a failure midway leaves the model equivalent
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
        empty_slot(linear, adapters.name)
        del adapters.linears[full_name]
    for full_name in list(adapters.embeddings):
        table, rows = adapters.embeddings[full_name]
        if not rows.moves_head:
            model.untie_head()  # the head keeps the base's weight
        weight, _ = rows.merged(table.weight.float())
        table.weight = nn.Parameter(weight.to(table.weight.dtype), requires_grad=False)
        table.adapter = None
        del adapters.embeddings[full_name]
    adapters.replaced.clear()  # fully trained parameters keep their trained values
    adapters.undo.clear()
    remove(model, adapters)
    return model
