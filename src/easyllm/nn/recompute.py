"""Activation checkpointing: keep a block's input, compute the rest again in the backward pass
(Chen et al. 2016, arXiv 1604.06174)."""

from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from easyllm.nn.decoder import Decoder

Recompute = Literal["none", "selective", "full"]


def recompute_activations(model: Decoder, mode: Recompute) -> Decoder:
    """Has every layer (`full`), or only its feed-forward (`selective`), computed again in the backward pass.

    The results are the same, random states included; nothing changes where no gradient is asked for.
    """
    for layer in model.layers:
        if mode == "full":
            _recompute(layer)
        elif mode == "selective":
            feed_forward = layer.feed_forward
            assert isinstance(feed_forward, nn.Module), "every layer has one"
            _recompute(feed_forward)
    return model


def _recompute(module: nn.Module) -> None:
    plain = module.forward

    def forward(*inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*inputs)
        return checkpoint(plain, *inputs, use_reentrant=False)

    module.forward = forward
