"""Ablation: blocks that add nothing, and what the model loses without them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from easyllm.nn.decoder import Decoder
from easyllm.probe.residual import BLOCKS, check_additive, output_of

Block = tuple[int, str]
"""A layer's number and `mixer` or `feed_forward`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance:
    """What is lost without a block.

    Attributes:
        layer: number of the layer.
        block: `mixer` or `feed_forward`.
        loss_nats: increase of the mean loss per token, in nats.
        kl_nats: mean KL divergence from the complete model's predictions, in nats.
    """

    layer: int
    block: str
    loss_nats: float
    kl_nats: float


@contextmanager
def ablated(model: Decoder, blocks: Iterable[Block]) -> Iterator[None]:
    """Removes what blocks add to the residual stream, inside the context (zero ablation).

    Raises:
        ConfigError: the residual stream of the model is not a sum.
    """
    check_additive(model)

    def nothing(_module: nn.Module, _inputs: object, out: Tensor) -> Tensor:
        return torch.zeros_like(out)

    handles = [
        output_of(model.layers[layer], block).register_forward_hook(nothing)
        for layer, block in blocks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def block_importance(model: Decoder, token_ids: Sequence[int]) -> list[Importance]:
    """Returns what the model loses on a text without each of its blocks, one at a time.

    Args:
        model: the model.
        token_ids: the text, at least two tokens.
    """
    ids = torch.tensor(token_ids, device=model.device)
    whole = model.logits(ids)[:-1].log_softmax(-1)
    before = F.nll_loss(whole, ids[1:])
    found = []
    for layer in range(len(model.layers)):
        for block in BLOCKS:
            with ablated(model, [(layer, block)]):
                without = model.logits(ids)[:-1].log_softmax(-1)
            kl = F.kl_div(without, whole, log_target=True, reduction="batchmean")
            loss = F.nll_loss(without, ids[1:]) - before
            found.append(
                Importance(layer=layer, block=block, loss_nats=float(loss), kl_nats=float(kl))
            )
    return found


__all__ = ["Block", "Importance", "ablated", "block_importance"]
