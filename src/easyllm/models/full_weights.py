"""What changes the shapes of weights needs the weights themselves: not quantized, and without an adapter made for them."""

from easyllm.core.errors import ConfigError
from easyllm.nn.decoder import Decoder


def require_full_weights(model: Decoder, change: str) -> None:
    """Refuses a model whose weights are not plain ones.

    Args:
        change: what is to be done to the model, for the message.

    Raises:
        ConfigError: a weight is quantized, or an adapter is attached.
    """
    if formats := model.packed_formats():
        raise ConfigError(
            f"{change} needs full weights, and this model's are quantized ({', '.join(sorted(formats))}); "
            "start from the checkpoint with full weights, and quantize the result"
        )
    if model.is_adapted:
        raise ConfigError(
            f"{change} needs a model without an adapter, and this one has one; merge or detach the adapter first"
        )
