"""Lists the linear layers (GEMMs) of a model, which adapters attach to and quantization packs."""

import re
from functools import lru_cache

from easyllm.nn.config import ModelConfig
from easyllm.nn.cost import LinearPart, LinearShape
from easyllm.nn.decoder import DecoderLayer
from easyllm.nn.linear import Linear
from easyllm.nn.moe import ROUTERS
from easyllm.plan.parts import layers_of


def layer_linears(layer: DecoderLayer) -> list[LinearShape]:
    """Returns all linears of a layer; the same linear of all experts is one entry with copies."""
    found: dict[str, LinearShape] = {}
    for name, module in layer.named_modules():
        if not isinstance(module, Linear):
            continue
        leaf = name.rsplit(".", 1)[1]
        one = re.sub(r"\.\d+\.", ".", name)  # the same name for all experts
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
    """Returns the number of weights in the layers' linears, which quantization and Muon act on."""
    return sum(linear.weights for linear in model_linears(config))


@lru_cache(maxsize=16)
def model_linears(config: ModelConfig) -> tuple[LinearShape, ...]:
    """Returns all linears inside the layers, in order."""
    layers = layers_of(config)
    found = {layer: layer_linears(layer) for layer in dict.fromkeys(layers)}
    return tuple(linear for layer in layers for linear in found[layer])


def largest_rank(config: ModelConfig) -> int:
    """Returns the maximum rank of an adapter that targets all linears."""
    return min(linear.rank for linear in model_linears(config) if linear.part != "router")
