"""Updates of weights as low-rank factors: ΔW = B A, exact or truncated to a rank.

A method that adds an update to any weight gives its factors. For any other method that merges,
ΔW = merged(W) - W for the weight W that the layer has, and the factors are those of its largest
singular values (Eckart and Young 1936: the best approximation of this rank).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from easyllm.adapters.adapter import Adapter, EmbeddingAdapter
from easyllm.adapters.adapter_set import AdapterSet
from easyllm.adapters.attach import EMBEDDING, place
from easyllm.adapters.embedding import LoRAEmbedding
from easyllm.adapters.lora import LoRA, LoRAConfig
from easyllm.adapters.pissa import largest_singular
from easyllm.core.errors import ConfigError
from easyllm.nn.decoder import Decoder
from easyllm.nn.linear import Embedding, Linear

Layer = Linear | Embedding
Part = tuple[float, Layer, Adapter | EmbeddingAdapter]
"""A term of a sum of updates: its weight, the layer and the adapter's module."""
EXACT = 1024
"""Matrices whose smaller side is at most this are decomposed exactly; of larger ones, which would
take minutes, the randomised method with `ITERATIONS` power iterations finds the singular values."""
ITERATIONS = 8


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors of an update.

    Attributes:
        down: A, [r, in] fp32.
        up: B, [out, r] fp32.
        norm: ‖ΔW‖, the Frobenius norm of the update.
        lost: ‖ΔW - B A‖; 0 if the factors are exact.
    """

    down: Tensor
    up: Tensor
    norm: float
    lost: float = 0.0

    @property
    def rank(self) -> int:
        """The rank r."""
        return len(self.down)

    @property
    def error(self) -> float:
        """‖ΔW - B A‖ / ‖ΔW‖, 0 for an update of zero."""
        return self.lost / self.norm if self.norm else 0.0


def total_error(factors: Mapping[str, Factors]) -> float:
    """Returns the relative Frobenius error of all updates together."""
    norm = sum(each.norm**2 for each in factors.values())
    lost = sum(each.lost**2 for each in factors.values())
    return float((lost / norm) ** 0.5) if norm else 0.0


@torch.no_grad()
def factors_of_sum(name: str, parts: Sequence[Part], rank: int | None) -> Factors:
    """Returns the factors of a weighted sum of updates of one layer.

    Args:
        name: the layer's name, for error messages.
        parts: the terms; all of the same layer.
        rank: the largest rank r; None keeps the sum exact, with the ranks added up.

    Raises:
        ConfigError: a method changes the bias, too; or the sum has no exact factors and `rank` is
            None.
    """
    known = [(weight, module.update_factors()) for weight, _, module in parts]
    exact = [(weight, factors) for weight, factors in known if factors is not None]
    if len(exact) == len(parts):
        down = torch.cat([factors[0] for _, factors in exact])
        up = torch.cat([weight * factors[1] for weight, factors in exact], dim=1)
        return _truncated(down, up, rank)
    if rank is None:
        raise ConfigError(
            f"an update of {name} depends on the weight and has no exact factors; give the rank "
            "of the result"
        )
    updates = [weight * _update(name, layer, module) for weight, layer, module in parts]
    return _approximated(torch.stack(updates).sum(0), rank)


def attach_lora(
    model: Decoder,
    factors: Mapping[str, Factors],
    *,
    name: str = "",
    like: LoRAConfig | None = None,
    base_parameters: Sequence[str] = (),
) -> AdapterSet:
    """Attaches a LoRA adapter with these factors, of scale 1.

    Args:
        model: the model; modified in place.
        factors: by the name of the layer.
        name: as for `attach.place`.
        like: a configuration with settings other than ranks, scales and targets.
        base_parameters: names of the base parameters that belong to the adapter.

    Raises:
        ConfigError: the model has an adapter of this name, or an unnamed one.
    """
    # a layer without an update (all of its ranks are pruned) has an update of rank 1 that is zero
    factors = {n: each if each.rank else _zero(each) for n, each in factors.items()}
    ranks = {layer: each.rank for layer, each in factors.items()}
    counts = list(ranks.values())
    usual = max(counts, key=counts.count)
    others = {layer: rank for layer, rank in ranks.items() if rank != usual}
    config = (like or LoRAConfig()).model_copy(
        update={
            "rank": usual,
            "alpha": float(usual),
            "rank_pattern": others,
            "alpha_pattern": {layer: float(rank) for layer, rank in others.items()},
            "targets": tuple(factors),
            "exclude": (),
        }
    )
    adapters = place(model, config, base_parameters=base_parameters, name=name)
    with torch.no_grad():
        for layer, each in factors.items():
            _, module = adapters.adapted[layer]
            if isinstance(module, LoRAEmbedding):
                module.lora_embedding_A.copy_(each.up.T)
                module.lora_embedding_B.copy_(each.down.T)
            else:
                assert isinstance(module, LoRA), "built by LoRAConfig"
                module.lora_A.copy_(each.down)
                module.lora_B.copy_(each.up)
    for parameter in adapters.own_parameters():
        parameter.requires_grad_(False)
    return adapters


def _zero(empty: Factors) -> Factors:
    """Returns factors of rank 1 whose product is zero, in the place of ones of rank 0."""
    return Factors(
        empty.down.new_zeros(1, empty.down.shape[1]), empty.up.new_zeros(len(empty.up), 1), 0.0
    )


def _update(name: str, layer: Layer, module: Adapter | EmbeddingAdapter) -> Tensor:
    """Returns ΔW = merged(W) - W, [out, in] fp32.

    Raises:
        ConfigError: the method changes the bias, too.
    """
    dense = layer.storage.dense().float()
    if isinstance(module, EmbeddingAdapter):
        return module.merged(dense)[0] - dense
    bias = layer.bias.float() if isinstance(layer, Linear) and layer.bias is not None else None
    merged, merged_bias = module.merged(dense, bias)
    same = merged_bias is None if bias is None else torch.equal(_known(merged_bias), bias)
    if not same:
        raise ConfigError(
            f"the adapter also changes the bias of {name}, which low-rank factors cannot express; "
            "merge it instead"
        )
    return merged - dense


def _known(bias: Tensor | None) -> Tensor:
    return torch.empty(0) if bias is None else bias


def _truncated(down: Tensor, up: Tensor, rank: int | None) -> Factors:
    """Returns the best approximation of B A of rank `rank`, from the factors alone.

    Args:
        down: A, [R, in].
        up: B, [out, R].
        rank: None, or at least R, keeps the factors.
    """
    left, above = torch.linalg.qr(up.double())  # [out, m], [m, R] with m = min(out, R)
    right, below = torch.linalg.qr(down.double().T)
    u, s, v = torch.linalg.svd(above @ below.T, full_matrices=False)
    norm = float(s.norm())
    if rank is None or len(down) <= rank:
        return Factors(down, up, norm)
    root = s[:rank].sqrt()
    return Factors(
        (root[:, None] * (v[:rank] @ right.T)).float(),
        ((left @ u[:, :rank]) * root).float(),
        norm,
        float(s[rank:].norm()),
    )


def _approximated(update: Tensor, rank: int) -> Factors:
    """Returns the best approximation of ΔW [out, in] of rank `rank`, or of its full rank."""
    rank = min(rank, *update.shape)
    iterations = None if min(update.shape) <= EXACT else ITERATIONS
    u, s, v = largest_singular(update, rank, iterations, Generator().manual_seed(0))
    root = s.sqrt()
    down, up = root[:, None] * v, u * root
    return Factors(down, up, float(update.norm()), float((update - up @ down).norm()))


__all__ = [
    "EMBEDDING",
    "Factors",
    "Layer",
    "Part",
    "attach_lora",
    "factors_of_sum",
    "total_error",
]
