"""The linears of a layer: what adapters attach to, quantization packs and products run through."""

import re

from easyllm.nn.config import ModelConfig
from easyllm.nn.cost import LinearPart, LinearShape
from easyllm.nn.decoder import DecoderLayer
from easyllm.nn.linear import Linear
from easyllm.nn.moe import ROUTERS
from easyllm.plan.parts import layers_of


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


def largest_rank(config: ModelConfig) -> int:
    """The largest rank that adapters of all linears may have."""
    return min(linear.rank for linear in model_linears(config) if linear.part != "router")
