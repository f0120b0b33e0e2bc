"""Gradient (activation) checkpointing: only the input of a block is saved.

The other activations are recomputed in the backward pass (Chen et al. 2016, arXiv 1604.06174).
"""

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from easyllm.nn.context import ForwardContext
from easyllm.nn.decoder import Decoder, DecoderLayer

Recompute = Literal["none", "selective", "full"]

_checkpoint: Callable[..., Any] = getattr(checkpoint, "__wrapped__", checkpoint)
"""PyTorch's function without the decorator that hides it from `torch.compile`: that one imports
the compiler (TorchDynamo, SymPy, Triton) on the first call, about 150 MB that nothing here uses."""

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
        return recomputed_call(plain, *inputs)

    return forward


def recomputed_call(function: Callable[..., T], *inputs: object) -> T:
    """Returns `function(*inputs)`, which the backward pass computes again from its inputs.

    `torch.utils.checkpoint` without the decorator that imports the compiler of PyTorch.
    """
    result: T = _checkpoint(function, *inputs, use_reentrant=False)
    return result
