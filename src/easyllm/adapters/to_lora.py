"""Converting an attached adapter to LoRA: the truncated SVD of each update.

    ΔW = merged(W) - W ≈ B A,   A: [r, in],  B: [out, r]

Other programs read LoRA files, but few read the other methods. Updates of LoRA and its relatives
are low-rank already and stay exact if r is at least their rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from easyllm.adapters.adapter_set import AdapterSet
from easyllm.adapters.attach import adapter_of, remove
from easyllm.adapters.embedding import TrainedTokens
from easyllm.adapters.factors import Factors, attach_lora, factors_of_sum, total_error
from easyllm.adapters.lora import LoRAConfig
from easyllm.adapters.low_rank import LowRankConfig
from easyllm.core.errors import ConfigError
from easyllm.nn.decoder import Decoder


@dataclass(frozen=True, slots=True)
class Conversion:
    """An adapter that was converted to LoRA.

    Attributes:
        adapters: the LoRA adapter, attached in place of the other.
        factors: its factors with the error of each, by the name of the layer.
    """

    adapters: AdapterSet
    factors: Mapping[str, Factors]

    @property
    def error(self) -> float:
        """The relative Frobenius error of all updates together."""
        return total_error(self.factors)


@torch.no_grad()
def to_lora(model: Decoder, rank: int, name: str = "") -> Conversion:
    """Replaces an attached adapter by a LoRA adapter of at most this rank.

    Base modules, biases and token rows that were trained with it are kept as they are.

    Args:
        model: the model that the adapter is attached to; modified in place.
        rank: the largest rank r of each layer.
        name: the adapter's name; empty for the unnamed one.

    Raises:
        ConfigError: there is no such adapter, it adapts no layer, it changes a bias of a layer, or
            `rank` is not positive. The model is then unchanged.
    """
    adapters = adapter_of(model, name)
    config = adapters.config
    if rank < 1:
        raise ConfigError(f"the rank of a LoRA adapter is {rank}, expected at least 1")
    if config.level != "linear":
        raise ConfigError(
            f"an adapter of kind {config.kind} cannot become LoRA: virtual tokens do not update "
            "a weight"
        )
    rows = {n: m for n, (_, m) in adapters.embeddings.items() if isinstance(m, TrainedTokens)}
    updated = {n: part for n, part in adapters.adapted.items() if n not in rows}
    if not updated:
        raise ConfigError(
            f"an adapter of kind {config.kind} cannot become LoRA: this one adapts no linear "
            "layer; it only trains parameters of the base"
        )
    factors = {
        layer_name: factors_of_sum(layer_name, [(1.0, layer, module)], rank)
        for layer_name, (layer, module) in updated.items()
    }
    like = LoRAConfig(also_trained=config.also_trained)
    if isinstance(config, LowRankConfig):
        kept = {"bias": config.bias, "trained_tokens": config.trained_tokens}
        like = like.model_copy(update=kept)
    remove(model, adapters)
    found = attach_lora(
        model, factors, name=name, like=like, base_parameters=adapters.base_parameters
    )
    for layer_name, module in rows.items():
        own = found.embeddings[layer_name][1]
        assert isinstance(own, TrainedTokens), "trained_tokens are those of the other adapter"
        own.delta.copy_(module.delta)
    found.replaced, found.undo = adapters.replaced, adapters.undo
    return Conversion(found, factors)


__all__ = ["Conversion", "to_lora"]
