"""Gradient (activation) checkpointing: only the input of a block is saved.

The other activations are recomputed in the backward pass (Chen et al. 2016, arXiv 1604.06174).
"""

from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from easyllm.nn.context import ForwardContext
from easyllm.nn.decoder import Decoder, DecoderLayer

Recompute = Literal["none", "selective", "full"]

T = TypeVar("T")
Added = tuple[Tensor, Tensor | None]
"""The residual stream as two terms; see `DecoderLayer.forward`."""


def recompute_activations(model: Decoder, mode: Recompute) -> Decoder:
    """Applies gradient checkpointing to all layers (`full`) or their feed-forwards (`selective`).

    The results are the same, including the RNG state; without gradients nothing changes.

    Returns:
        The model itself, changed in place.
    """
    for layer in model.layers:
        assert isinstance(layer, DecoderLayer), "a decoder has no other layers"
        if mode == "full":
            _recompute_layer(layer)
        elif mode == "selective":
            layer.feed_forward.forward = _recomputed(layer.feed_forward.forward)
    return model


def _recompute_layer(layer: DecoderLayer) -> None:
    recomputed = _recomputed(layer.forward)

    def forward(x: Tensor, context: ForwardContext, added: Tensor | None = None) -> Added:
        # add the two terms first, so that only one tensor is saved
        return recomputed(x if added is None else x + added, context)

    layer.forward = forward  # type: ignore[method-assign]


def _recomputed(plain: Callable[..., T]) -> Callable[..., T]:
    def forward(*inputs: object) -> T:
        if not torch.is_grad_enabled():
            return plain(*inputs)
        result: T = checkpoint(plain, *inputs, use_reentrant=False)
        return result

    return forward
