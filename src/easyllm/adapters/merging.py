"""Merging adapters into the weights of a model, and restoring the weights afterwards.

The merged weight is computed in fp32 and rounded once: to the dtype of the weight, or to the codes
of its quantized format (`requantize`).
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from easyllm.adapters.adapter import Adapter, EmbeddingAdapter
from easyllm.adapters.adapter_set import AdapterSet
from easyllm.adapters.attach import adapter_of, empty_slot, fill_slots, remove
from easyllm.core.errors import ConfigError
from easyllm.nn.config import ModelConfig
from easyllm.nn.decoder import Decoder
from easyllm.nn.linear import Embedding, Linear
from easyllm.nn.storage import WeightStorage
from easyllm.quant import FORMATS, quantize_weight

DENSE = "dense"


@dataclass(frozen=True, slots=True)
class _Weight:
    """The weight and the bias of a layer, which can be set again."""

    storage: WeightStorage
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    @classmethod
    def of(cls, layer: Linear | Embedding) -> "_Weight":
        """Returns those that the layer has now, not copied."""
        weight = layer._parameters.get("weight")  # None if the weight is quantized
        return cls(layer.storage, weight, layer.bias if isinstance(layer, Linear) else None)

    def set(self, layer: Linear | Embedding) -> None:
        """Gives the layer this weight and this bias, on the device where it now is."""
        device = layer.storage.device
        if self.weight is not None:
            self.weight.data = self.weight.data.to(device)
            layer.weight = self.weight
        else:
            assert isinstance(self.storage, nn.Module), "a quantized weight is a module"
            layer.store(self.storage.to(device))
        if isinstance(layer, Linear):
            if self.bias is not None:
                self.bias.data = self.bias.data.to(device)
            layer.bias = self.bias

    def is_of(self, layer: Linear | Embedding) -> bool:
        """Returns whether the layer still has this weight."""
        now = _Weight.of(layer)
        return now.storage is self.storage and now.weight is self.weight


@dataclass(slots=True)
class Merge:
    """A merge that can be undone.

    Attributes:
        adapters: the adapter that was merged.
        originals: for each layer, the weight before and after the merge.
        linears, embeddings: what `adapters` contained.
        head: the model's configuration and output head, if the merge has untied the head.
        trained: whether each fully trained base parameter required a gradient.
    """

    adapters: AdapterSet
    originals: list[tuple[Linear | Embedding, _Weight, _Weight]] = field(default_factory=list)
    linears: dict[str, tuple[Linear, Adapter]] = field(default_factory=dict)
    embeddings: dict[str, tuple[Embedding, EmbeddingAdapter]] = field(default_factory=dict)
    head: tuple[ModelConfig, Linear | None] | None = None
    trained: dict[str, bool] = field(default_factory=dict)

    def restore(self, model: Decoder) -> None:
        """Restores the weights and what the set of adapters contained; attaches nothing."""
        for layer, before, _ in reversed(self.originals):
            before.set(layer)
        if self.head is not None:
            model.config, model.lm_head = self.head
        self.adapters.linears, self.adapters.embeddings = self.linears, self.embeddings
        for name, needs_gradient in self.trained.items():
            model.get_parameter(name).requires_grad_(needs_gradient)


@torch.no_grad()
def merge(
    model: Decoder,
    name: str = "",
    *,
    weight: float = 1.0,
    requantize: bool = False,
    reversible: bool = False,
) -> Decoder:
    """Merges an adapter into the weights (in fp32, rounded once) and removes it.

    Args:
        model: the model; modified in place.
        name: the adapter's name; empty for the unnamed one.
        weight: factor on the update, for methods that add one to the weight (LoRA, PiSSA, AdaLoRA).
        requantize: whether a quantized weight is dequantized, merged and quantized to the same
            format again, which rounds it a second time; without it, such weights are refused.
        reversible: whether to keep what `unmerge` needs: the original weights of the adapted
            layers and the adapter. The merged weights are then additional memory, as much as these
            layers take.

    Returns:
        The same model.

    Raises:
        ConfigError: there is no such adapter, the method cannot be merged (or not with this
            `weight`), other named adapters are attached, or the weights are quantized.
    """
    adapters = adapter_of(model, name)
    check_mergeable(model, name, weight=weight, requantize=requantize)
    record = Merge(
        adapters,
        linears=dict(adapters.linears),
        embeddings=dict(adapters.embeddings),
        trained={n: model.get_parameter(n).requires_grad for n in adapters.base_parameters},
    )
    try:
        _merge_layers(model, adapters, weight, record if reversible else None)
    except BaseException:
        if reversible:
            for linear, _ in adapters.linears.values():  # those that are not merged yet
                empty_slot(linear, adapters.name)
            del model.adapter_sets[adapters.name]
            record.restore(model)
            fill_slots(model, adapters)
        raise
    if reversible:
        model.merges.append(record)
    else:
        model.merges.clear()  # undoing them would undo this merge as well
        adapters.replaced.clear()  # fully trained parameters keep their trained values
        adapters.undo.clear()
    remove(model, adapters)
    return model


def unmerge(model: Decoder) -> Decoder:
    """Undoes the last reversible merge: the weights are bitwise those before it.

    The adapter is attached again. Weights and adapter are moved to the model's present device.

    Args:
        model: the model; modified in place.

    Returns:
        The same model.

    Raises:
        ConfigError: no merge can be undone, the weights have been replaced since, or another
            adapter is attached.
    """
    if not model.merges:
        raise ConfigError(
            "no merge can be undone in this model; merge with reversible=True to keep the "
            "original weights"
        )
    if model.adapter_sets:
        held = ", ".join(repr(name) for name in model.adapter_sets)
        raise ConfigError(
            f"undoing a merge would change the base of the attached adapter {held}; detach it first"
        )
    record: Merge = model.merges[-1]
    if not all(after.is_of(layer) for layer, _, after in record.originals):
        raise ConfigError(
            "the weights were replaced after the merge (quantized, resized or merged again), so "
            "it cannot be undone; load the base model again"
        )
    model.merges.pop()
    record.restore(model)
    for _, module in record.adapters.adapted.values():
        module.to(model.device)
    fill_slots(model, record.adapters)
    return model


def check_mergeable(
    model: Decoder, name: str = "", *, weight: float = 1.0, requantize: bool = False
) -> None:
    """Checks, before any work is done, that `merge` accepts the same arguments.

    Raises:
        ConfigError: as for `merge`.
    """
    adapters = adapter_of(model, name)
    config = adapters.config
    others = [other for other in model.adapter_sets if other != name]
    if others:
        raise ConfigError(
            f"merging {name!r} would change the base of {', '.join(map(repr, others))}; "
            "detach them first"
        )
    reason = config.merge_unsupported_reason()
    if reason is not None:
        raise ConfigError(f"an adapter of kind {config.kind} cannot be merged: {reason}")
    if weight != 1:
        _check_weight(adapters, weight)
    for full_name, (layer, _) in adapters.adapted.items():
        packed = layer.storage.format
        if packed == DENSE:
            continue
        only_read = packed not in FORMATS or FORMATS[packed].quantize is None
        if only_read:
            raise ConfigError(
                f"an adapter cannot be merged into {full_name}, which is stored as {packed}, a "
                "format of files; quantize the dequantized model with its adapter (easyllm "
                "quantize ADAPTER OUT --dequantize)"
            )
        if not requantize:
            raise ConfigError(
                f"an adapter cannot be merged into quantized weights ({full_name} is stored as "
                f"{packed}); merge it into the unquantized model, then quantize, or merge in "
                "Python with requantize=True, which rounds the weights again"
            )


def _check_weight(adapters: AdapterSet, weight: float) -> None:
    """Checks that every change that the adapter makes can be scaled."""
    kind = adapters.config.kind
    if not math.isfinite(weight):
        raise ConfigError(f"weight={weight:g} is not a finite number; give one, such as 0.5")
    if adapters.base_parameters:
        raise ConfigError(
            f"weight={weight:g} cannot scale this adapter of kind {kind}, which was trained with "
            f"{adapters.base_parameters[0]} of the base; merge it with weight=1"
        )
    for full_name, (_, module) in adapters.adapted.items():
        if module.update_factors() is None:
            raise ConfigError(
                f"weight={weight:g} cannot scale an adapter of kind {kind}: what it changes in "
                f"{full_name} is not an update that is added to any weight; merge it with weight=1"
            )


def _merge_layers(
    model: Decoder, adapters: AdapterSet, weight: float, record: Merge | None
) -> None:
    """Merges one layer at a time and empties its slot, so that a failure leaves an equal model."""
    for full_name in list(adapters.linears):
        linear, adapter = adapters.linears[full_name]
        before = _Weight.of(linear)
        dense = linear.storage.dense().float()
        bias = None if linear.bias is None else linear.bias.float()
        merged, merged_bias = _scaled(adapter, dense, bias, weight)
        if merged_bias is not None and linear.bias is None:
            raise ConfigError(
                f"an adapter of kind {adapters.config.kind} adds a bias to {full_name}, which has "
                "none; use the adapter without merging"
            )
        _set_weight(linear, merged, full_name)
        if merged_bias is not None and linear.bias is not None:
            linear.bias = nn.Parameter(merged_bias.to(linear.bias.dtype), requires_grad=False)
        empty_slot(linear, adapters.name)
        del adapters.linears[full_name]
        if record is not None:
            record.originals.append((linear, before, _Weight.of(linear)))
    for full_name in list(adapters.embeddings):
        table, rows = adapters.embeddings[full_name]
        before = _Weight.of(table)
        if not rows.moves_head:
            if record is not None:
                record.head = model.config, model.lm_head
            model.untie_head()  # the head keeps the base's weight
        merged, _ = _scaled(rows, table.storage.dense().float(), None, weight)
        _set_weight(table, merged, full_name)
        table.adapter = None
        del adapters.embeddings[full_name]
        if record is not None:
            record.originals.append((table, before, _Weight.of(table)))


def _scaled(
    module: Adapter | EmbeddingAdapter, dense: Tensor, bias: Tensor | None, weight: float
) -> tuple[Tensor, Tensor | None]:
    """Returns the merged weight and bias, in fp32, with the update times `weight`."""
    if weight == 1:
        return module.merged(dense, bias)  # type: ignore[arg-type]
    factors = module.update_factors()
    assert factors is not None, "checked before"
    down, up = (factor.to(dense.device) for factor in factors)
    return torch.addmm(dense, up, down, alpha=weight), bias


def _set_weight(layer: Linear | Embedding, weight: Tensor, name: str) -> None:
    """Sets a layer's weight, in the dtype or the quantized format that it has."""
    if layer.storage.format == DENSE:
        layer.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)
    else:
        format = FORMATS[layer.storage.format]
        layer.store(quantize_weight(weight.to(layer.storage.dtype), format, f"{name}.weight"))


__all__ = ["Merge", "check_mergeable", "merge", "unmerge"]
