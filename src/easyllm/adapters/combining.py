"""Weighted sums of named adapters, as one more adapter that requests can select.

    ΔW = Σ wᵢ ΔWᵢ,   exact with the ranks added up: A = [A₁; A₂; …],  B = [w₁ s₁ B₁, w₂ s₂ B₂, …]
    or the best approximation of a given rank (see `factors`)

With all weights 1 the adapters are stacked. Each request still selects one name, so an engine
serves the parts and their sum at once.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from easyllm.adapters.adapter_set import AdapterSet
from easyllm.adapters.attach import adapter_of
from easyllm.adapters.factors import Factors, Part, attach_lora, factors_of_sum, total_error
from easyllm.core.errors import ConfigError
from easyllm.nn.decoder import Decoder


@dataclass(frozen=True, slots=True)
class Combined:
    """A sum of adapters that was attached.

    Attributes:
        name: the name that requests select it by.
        adapters: the attached LoRA adapter.
        factors: its factors with the error of each, by the name of the layer.
    """

    name: str
    adapters: AdapterSet = field(repr=False)
    factors: Mapping[str, Factors] = field(repr=False)  # matrices would fill an interactive session

    @property
    def error(self) -> float:
        """The relative Frobenius error of all updates together; 0 for an exact sum."""
        return total_error(self.factors)


@torch.no_grad()
def combine(
    model: Decoder,
    weights: Mapping[str, float],
    *,
    name: str | None = None,
    rank: int | None = None,
) -> Combined:
    """Attaches the weighted sum of named adapters as one LoRA adapter; the parts stay attached.

    Args:
        model: the model that the adapters are attached to.
        weights: the factor on each adapter's update, by its name.
        name: the name of the sum; by default the formula, such as `a+b` or `0.7*a+0.3*b`.
        rank: the largest rank in each layer; None makes the sum exact, with the ranks added up.
            Methods whose update depends on the weight (DoRA, IA³) need it.

    Raises:
        ConfigError: an adapter of this name does not exist, the sum's name is taken, an update
            cannot be expressed by low-rank factors, or `rank` is missing or not positive.

    Example:
        >>> llm = LLM("smollm2", adapters={"a": one, "b": other})        # doctest: +SKIP
        >>> combine(llm.model, {"a": 1, "b": 1})                         # doctest: +SKIP
        >>> llm.generate(["Hello"], adapter="a+b")                       # doctest: +SKIP
    """
    if not weights:
        raise ConfigError("combine got no adapter; give the weight of at least one by its name")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank={rank} is not positive; give at least 1, or none for an exact sum")
    name = formula(weights) if name is None else name
    if not name:
        raise ConfigError("the sum of adapters needs a name, by which requests select it")
    parts: dict[str, list[Part]] = {}
    for each, weight in weights.items():
        if not math.isfinite(weight):
            raise ConfigError(
                f"the weight of {each!r} is {weight:g}, expected a finite number, such as 0.5"
            )
        if not each:
            raise ConfigError(
                "only named adapters can be combined; load each with a name: "
                "add_adapter(model, folder, name=...)"
            )
        adapters = adapter_of(model, each)
        _check_linear(adapters, each)
        for layer_name, (layer, module) in adapters.linears.items():
            parts.setdefault(layer_name, []).append((float(weight), layer, module))
    factors = {layer: factors_of_sum(layer, terms, rank) for layer, terms in parts.items()}
    return Combined(name, attach_lora(model, factors, name=name), factors)


def formula(weights: Mapping[str, float]) -> str:
    """Returns the default name of a sum.

    >>> formula({"a": 1, "b": 1}), formula({"a": 0.7, "b": -0.3})
    ('a+b', '0.7*a-0.3*b')
    """
    text = ""
    for name, weight in weights.items():
        sign = "-" if weight < 0 else "+" if text else ""
        text += sign + (name if abs(weight) == 1 else f"{abs(weight):g}*{name}")
    return text


def _check_linear(adapters: AdapterSet, name: str) -> None:
    """Checks that an adapter changes nothing but linears."""
    if adapters.base_parameters:
        raise ConfigError(
            f"the adapter {name!r} was trained with {adapters.base_parameters[0]} of the base, "
            "which cannot be part of a sum; merge it, or train without it"
        )
    if not adapters.linears:
        raise ConfigError(
            f"the adapter {name!r} of kind {adapters.config.kind} adapts no linear layer, so it "
            "has no update that could be part of a sum"
        )


__all__ = ["Combined", "combine", "formula"]
