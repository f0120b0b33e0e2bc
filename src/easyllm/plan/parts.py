"""The parts of a model without their weights, to be asked what they cost."""

from functools import lru_cache
from typing import Protocol, cast

import torch
from torch import nn

from easyllm.nn.config import LayerConfig, ModelConfig
from easyllm.nn.decoder import DecoderLayer
from easyllm.nn.norm import build_norm
from easyllm.nn.position import PositionCost, build_embedding_position


class Mixer(Protocol):
    """What a mixer says of itself, next to its `forward`."""

    position: PositionCost

    def cached_flops(self, context: int, /) -> int:
        """FLOPs of one more token's products with the earlier ones of `context` tokens."""

    def cache_elements(self) -> int:
        """Elements that the cache keeps of a token."""

    def state_bytes(self) -> int:
        """Bytes of a sequence's recurrent state."""


class FeedForward(Protocol):
    """What a feed-forward says of itself, next to its `forward`; one with experts has `inactive_experts`, too."""

    def inner_elements(self, rows: int, /) -> int:
        """Elements of the widest tensors that are there at once, for `rows` tokens."""


@lru_cache(maxsize=16)
def layers_of(config: ModelConfig) -> tuple[DecoderLayer, ...]:
    """The model's layers on the meta device; those of one configuration are one module."""
    found: dict[LayerConfig, DecoderLayer] = {}
    with torch.device("meta"):
        for number, layer in enumerate(config.layers):
            if layer not in found:
                found[layer] = DecoderLayer(layer, config, number)
    return tuple(found[layer] for layer in config.layers)


@lru_cache(maxsize=16)
def outside_of(config: ModelConfig) -> tuple[nn.Module, nn.Module]:
    """What adds positions to the embedding, and the norm before the head, on the meta device."""
    with torch.device("meta"):
        positions = build_embedding_position(
            config.embedding_position, config.max_seq_len, config.hidden_size
        )
        norm = build_norm(config.norm, config.hidden_size) if config.final_norm else nn.Identity()
    return positions, norm


def mixer_of(layer: DecoderLayer) -> Mixer:
    """A layer's mixer, to be asked."""
    return cast("Mixer", layer.mixer)


def feed_forward_of(layer: DecoderLayer) -> FeedForward:
    """A layer's feed-forward, to be asked."""
    return cast("FeedForward", layer.feed_forward)


def inactive_experts(layer: DecoderLayer) -> int:
    """Experts of a layer that a token does not pass."""
    return cast("int", getattr(layer.feed_forward, "inactive_experts", 0))
