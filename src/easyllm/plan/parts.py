"""Builds the parts of a model on the meta device, to query their costs without their weights.

The methods of adapters are imported when an adapter is asked about: an engine without one, which
plans its memory here, starts without them.
"""

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import nn

from easyllm.nn.config import LayerConfig, ModelConfig
from easyllm.nn.decoder import Decoder, DecoderLayer
from easyllm.nn.embedding_position import build_embedding_position
from easyllm.nn.encoder_decoder import CrossLayer, build_model
from easyllm.nn.linear import Linear
from easyllm.nn.norm import build_norm
from easyllm.nn.rotary import PositionCost

if TYPE_CHECKING:
    from easyllm.adapters import AdapterConfig


class Mixer(Protocol):
    """Cost queries that a mixer answers, in addition to its `forward`."""

    position: PositionCost

    def cached_flops(self, context: int, /) -> int:
        """Returns the FLOPs of attention from the last of `context` tokens to the cached ones."""

    def cache_elements(self) -> int:
        """Returns the number of elements per token in the KV cache."""

    def state_bytes(self) -> int:
        """Returns the bytes of the recurrent state of a sequence."""


class FeedForward(Protocol):
    """Cost queries that a feed-forward answers, in addition to its `forward`.

    A mixture of experts also has `inactive_experts`.
    """

    def inner_elements(self, rows: int, /) -> int:
        """Returns the elements of the widest tensors allocated at one time, for `rows` tokens."""


def layers_of(
    config: ModelConfig, adapter: "AdapterConfig | None" = None
) -> tuple[DecoderLayer, ...]:
    """Builds the model's layers on the meta device, including the adapters of their linears.

    Layers with the same configuration share one module.

    Raises:
        ConfigError: the adapter does not fit the model.
    """
    if adapter is None:
        return _layers_of(config, None, 0)
    return _layers_of(config, *_cache_key(adapter))


def _cache_key(adapter: "AdapterConfig") -> tuple[str, int]:
    """Returns hashable values that stand for an adapter: some of its fields are mappings.

    The class is one of them, since a kind may be registered again with another class.
    """
    return adapter.model_dump_json(), id(type(adapter))


def _adapter_of(adapter_json: str) -> "AdapterConfig":
    from easyllm.adapters import ADAPTERS

    return cast("AdapterConfig", ADAPTERS.validate(json.loads(adapter_json)))


@lru_cache(maxsize=16)
def _layers_of(
    config: ModelConfig, adapter_json: str | None, _kind: int
) -> tuple[DecoderLayer, ...]:
    adapter = None
    if adapter_json is not None:
        adapter = _adapter_of(adapter_json)
        _check_targets(config, adapter)
    by_layer = adapter is not None and adapter.differs_by_layer()
    found: dict[tuple[LayerConfig, int], DecoderLayer] = {}
    keys = [(layer, number * by_layer) for number, layer in enumerate(config.layers)]
    with torch.device("meta"):
        for number, key in enumerate(keys):
            if key not in found:
                kind = DecoderLayer if config.encoder is None else CrossLayer
                found[key] = _adapted(kind(key[0], config, number), number, adapter)
        stack = encoder_layers(config)
        encoder = {each: DecoderLayer(each, config, 0) for each in dict.fromkeys(stack)}
    return (*(encoder[each] for each in stack), *(found[key] for key in keys))


def encoder_layers(config: ModelConfig) -> tuple[LayerConfig, ...]:
    """Returns the layers of the encoder of an encoder–decoder; they are in front of the others."""
    return () if config.encoder is None else config.encoder.layers


def _adapted(layer: DecoderLayer, number: int, adapter: "AdapterConfig | None") -> DecoderLayer:
    for name, module in list(layer.named_modules(prefix=f"layers.{number}")):
        if adapter is not None and isinstance(module, Linear) and adapter.adapts(name):
            adapter.check(name, module.in_features, module.out_features)
            module.adapter = adapter.build(name, module.in_features, module.out_features)
    return layer


def _check_targets(config: ModelConfig, adapter: "AdapterConfig") -> None:
    """Raises if a target of the adapter matches no linear, as attaching the adapter does."""
    from easyllm.adapters.attach import target_layers

    if adapter.level == "linear":
        with torch.device("meta"):
            adapter.check_names([name for name, _ in target_layers(_model_of(config), adapter)])


def count_adapter_parameters(config: ModelConfig, adapter: "AdapterConfig") -> int:
    """Returns the number of trained parameters of an adapter.

    They include the modules of the base model that are trained in full with it (`also_trained`).

    Raises:
        ConfigError: the adapter does not fit the model.
    """
    return sum(parameter.numel() for parameter in adapter_parameters(config, adapter))


def adapter_parameters(config: ModelConfig, adapter: "AdapterConfig") -> tuple[nn.Parameter, ...]:
    """Returns the parameters that are trained with an adapter, on the meta device.

    The parameters of layers that share one module are listed once per layer.
    """
    return _adapter_parameters(config, *_cache_key(adapter))


@lru_cache(maxsize=16)
def _adapter_parameters(
    config: ModelConfig, adapter_json: str, _kind: int
) -> tuple[nn.Parameter, ...]:
    from easyllm.adapters import Adapter

    adapter = _adapter_of(adapter_json)
    found = [
        parameter
        for layer in layers_of(config, adapter)
        for module in layer.modules()
        if isinstance(module, Adapter)
        for parameter in module.parameters()
    ]
    with torch.device("meta"):
        if adapter.level == "model":
            found += cast("nn.Module", adapter.build_model_adapter(config)).parameters()
        table = adapter.build_embedding("embed_tokens", config.vocab_size, config.hidden_size)
        if table is not None:
            found += table.parameters()
        if adapter.adapts("lm_head"):
            head = _model_of(config).lm_head
            if head is not None:
                built = adapter.build("lm_head", head.in_features, head.out_features)
                found += built.parameters()
    return (*found, *trained_base_parameters(config, adapter))


def trained_base_parameters(
    config: ModelConfig, adapter: "AdapterConfig"
) -> tuple[nn.Parameter, ...]:
    """Returns the base model's parameters trained in full with an adapter, on the meta device."""
    return _trained_base_parameters(config, *_cache_key(adapter))


@lru_cache(maxsize=16)
def _trained_base_parameters(
    config: ModelConfig, adapter_json: str, _kind: int
) -> tuple[nn.Parameter, ...]:
    from easyllm.adapters.adapter_set import trained_base_parameters as names_trained

    model = _model_of(config)
    return tuple(model.get_parameter(n) for n in names_trained(model, _adapter_of(adapter_json)))


@lru_cache(maxsize=4)
def _model_of(config: ModelConfig) -> Decoder:
    """Builds the model on the meta device; its callers only read names and shapes."""
    with torch.device("meta"):
        return build_model(config)


def adapts_head(config: ModelConfig, adapter: "AdapterConfig | None") -> bool:
    """Returns whether the loss uses a copy of the head's weight with an adapter merged into it."""
    projects = not config.tie_embeddings and config.num_labels is None
    return adapter is not None and projects and adapter.adapts("lm_head")


def trains_head(config: ModelConfig, adapter: "AdapterConfig | None") -> bool:
    """Returns whether the loss computes a gradient of the head's weight or of its adapted copy."""
    if adapter is None or adapts_head(config, adapter):
        return True
    if config.num_labels is not None:
        return adapter.trains("score.weight")
    if not config.tie_embeddings:
        return adapter.trains("lm_head.weight")
    with torch.device("meta"):
        table = adapter.build_embedding("embed_tokens", config.vocab_size, config.hidden_size)
    follows = table is not None and table.moves_head
    return follows or adapter.trains("embed_tokens.weight")


def virtual_tokens(config: ModelConfig, adapter: "AdapterConfig | None") -> int:
    """Returns the number of virtual tokens that an adapter prepends to every sequence."""
    if adapter is None or adapter.level != "model":
        return 0
    with torch.device("meta"):
        return adapter.build_model_adapter(config).num_virtual


@lru_cache(maxsize=16)
def outside_of(config: ModelConfig) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Returns the parts outside the layers, on the meta device.

    They are the position embedding, the norm of the embedding, and the norm before the head.
    """
    with torch.device("meta"):
        positions = build_embedding_position(
            config.embedding_position, config.max_seq_len, config.hidden_size
        )
        first, last = (
            build_norm(config.norm, config.hidden_size) if wanted else nn.Identity()
            for wanted in (config.embedding_norm, config.final_norm)
        )
    return positions, first, last


def mixer_of(layer: DecoderLayer) -> Mixer:
    """Returns the layer's mixer, typed for cost queries."""
    return cast("Mixer", layer.mixer)


def feed_forward_of(layer: DecoderLayer) -> FeedForward:
    """Returns the layer's feed-forward, typed for cost queries."""
    return cast("FeedForward", layer.feed_forward)


def inactive_experts(layer: DecoderLayer) -> int:
    """Returns the number of the layer's experts that a token is not routed to."""
    return cast("int", getattr(layer.feed_forward, "inactive_experts", 0))
