"""Guard for operations that change weight shapes: weights must be unquantized and unadapted."""

import torch

from easyllm.core.errors import ConfigError
from easyllm.core.finite import all_finite
from easyllm.nn.decoder import Decoder
from easyllm.nn.linear import set_full_weight


@torch.no_grad()
def to_full_weights(model: Decoder) -> Decoder:
    """Replaces quantized weights by full ones, in place; returns the same model."""
    for _, layer in model.weight_modules():
        if layer.storage.format != "dense":
            set_full_weight(layer, layer.storage.dense())
    return model


def check_finite(model: Decoder, what: str) -> None:
    """Checks that all floating-point weights are finite.

    Args:
        model: the model.
        what: what it is, for the error message.

    Raises:
        ConfigError: one is not; the message names it.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not all_finite(tensor):
            raise ConfigError(
                f"{name} of {what} contains NaN or infinite values; check the checkpoint, or use "
                "a dtype with a larger range"
            )


def require_full_weights(model: Decoder, change: str) -> None:
    """Raises an error unless all weights of the model are unquantized and it has no adapter.

    Args:
        model: the model to check.
        change: the operation that needs full weights, named in the error message.

    Raises:
        ConfigError: a weight is quantized, or an adapter is attached.
    """
    if formats := model.packed_formats():
        raise ConfigError(
            f"{change} needs full weights, but this model's weights are quantized "
            f"({', '.join(sorted(formats))}); start from the unquantized checkpoint and quantize "
            "the result"
        )
    if model.is_adapted:
        raise ConfigError(
            f"{change} needs a model without an adapter, but this model has one; merge or detach "
            "the adapter first"
        )
