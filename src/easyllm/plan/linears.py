"""The linears of a layer: what adapters attach to, quantization packs and products run through."""

import re

from easyllm.adapters.attach import ALL_LINEAR
from easyllm.adapters.lora import LoRAConfig
from easyllm.core.errors import ConfigError, suggest
from easyllm.nn.config import ModelConfig
from easyllm.nn.cost import LinearPart, LinearShape
from easyllm.nn.decoder import DecoderLayer
from easyllm.nn.linear import Linear
from easyllm.plan.parts import layers_of

ROUTER = "router"
ROUTERS = (ROUTER, "shared_gate")


def layer_linears(layer: DecoderLayer) -> list[LinearShape]:
    """All linears of a layer; experts alike are one, with copies."""
    found: dict[str, LinearShape] = {}
    for name, module in layer.named_modules():
        if not isinstance(module, Linear):
            continue
        leaf = name.rsplit(".", 1)[1]
        one = re.sub(r"\.\d+\.", ".", name)  # of all experts
        copies = found[one].copies if one in found else 0
        found[one] = LinearShape(
            name=leaf,
            part=_part(name),
            in_features=module.in_features,
            out_features=module.out_features,
            copies=copies + 1,
        )
    return list(found.values())


def _part(name: str) -> LinearPart:
    if name.startswith("mixer."):
        return "attention"
    return "router" if name.endswith(ROUTERS) else "feed_forward"


def linear_weights(config: ModelConfig) -> int:
    """Elements of the matrices inside the layers: what quantization packs and Muon steps."""
    return sum(linear.weights for linear in model_linears(config))


def model_linears(config: ModelConfig) -> list[LinearShape]:
    """All linears inside the layers, in order."""
    return [linear for layer in layers_of(config) for linear in layer_linears(layer)]


def is_adapted(linear: LinearShape, lora: LoRAConfig | None) -> bool:
    """Whether this linear has an adapter; a router has none."""
    if lora is None or linear.name == ROUTER:
        return False
    return ALL_LINEAR in lora.targets or linear.name in lora.targets


def count_adapter_parameters(config: ModelConfig, lora: LoRAConfig) -> int:
    """Trained parameters: rank · (in + out) for every linear that carries an adapter (arXiv 2106.09685, section 4.2).

    Raises:
        ConfigError: a target names no linear of the model, or the rank is more than a matrix has.
    """
    linears = model_linears(config)
    known = {linear.name for linear in linears} - {ROUTER}
    for target in lora.targets:
        if target != ALL_LINEAR and target not in known:
            raise ConfigError(
                f"adapter target {target!r} names no linear of this model{suggest(target, known)}; "
                f"use {ALL_LINEAR} or some of {', '.join(sorted(known))}"
            )
    found = [linear for linear in linears if is_adapted(linear, lora)]
    _check_rank(found, lora)
    return sum(
        linear.copies * lora.rank * (linear.in_features + linear.out_features) for linear in found
    )


def _check_rank(linears: list[LinearShape], lora: LoRAConfig) -> None:
    """Refuses a rank that a matrix cannot have; only a gate of one output, which `all-linear` brings with it, may be given
    more."""
    full = [linear for linear in linears if linear.part != "router"]
    least = min(full, key=lambda linear: linear.rank, default=None)
    if least is not None and lora.rank > least.rank:
        raise ConfigError(
            f"adapter.rank={lora.rank} is more than the rank of {least.name}, {least.out_features} x "
            f"{least.in_features}, which is at most {least.rank}; lower adapter.rank, or leave {least.name} out of "
            "adapter.targets"
        )


def largest_rank(config: ModelConfig) -> int:
    """The largest rank that adapters of all linears may have."""
    return min(linear.rank for linear in model_linears(config) if linear.part != "router")
