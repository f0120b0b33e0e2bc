"""Next-token prediction: pretraining when every token is labelled, supervised fine-tuning when the answers are."""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from easyllm.data.packing import Batch
from easyllm.nn.decoder import Decoder
from easyllm.nn.moe import Routing, load_balancing_loss, router_z_loss
from easyllm.ops.cross_entropy import linear_cross_entropy


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Summed loss in nats with gradient, the tokens in the sum, and figures to log.

    The loop divides by the number of tokens of the whole step (all micro-batches, all ranks), never by a
    micro-batch's own: a mean of means weighs tokens unequally.

    Attributes:
        sum: summed over tokens.
        num_tokens: tokens in the sum.
        auxiliary: further terms to minimise, on the scale of `sum`, reported apart.
        metrics: means over the batch's tokens, by name.
    """

    sum: Tensor
    num_tokens: int
    auxiliary: Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)


class Objective(Protocol):
    """A loss over packed batches."""

    def loss(self, model: Decoder, batch: Batch) -> LossOutput: ...


class LanguageModel:
    """Σ -log p(label | tokens before it) over labelled tokens, and the losses of routers where there are any.

    Args:
        label_smoothing, z_loss: as `linear_cross_entropy` takes them.
    """

    def __init__(self, *, label_smoothing: float = 0.0, z_loss: float = 0.0) -> None:
        self.label_smoothing, self.z_loss = label_smoothing, z_loss

    def loss(self, model: Decoder, batch: Batch) -> LossOutput:
        config = model.config
        routing: list[Routing] | None = [] if config.has_experts else None
        context = batch.context(prefix=config.prompt_mask == "prefix", routing=routing)
        hidden = model(batch.token_ids, context)
        out = linear_cross_entropy(
            hidden,
            model.head_weight,
            batch.labels,
            softcap=config.logit_softcap,
            label_smoothing=self.label_smoothing if model.training else 0.0,
            z_loss=self.z_loss if model.training else 0.0,
        )
        if not routing:
            return LossOutput(out.sum, out.num_tokens)
        loss, metrics = router_losses(routing)
        return LossOutput(out.sum, out.num_tokens, loss * out.num_tokens, metrics)


def router_losses(routing: list[Routing]) -> tuple[Tensor, dict[str, float]]:
    """What routers add to the loss a token, and what they did.

    The losses of a batch are means over its layers with experts, as in HF; over the micro-batches of a step they are
    averaged by tokens. (A product of batch means, load balancing is the one loss that depends on how a step is cut.)
    """
    balance = torch.stack([load_balancing_loss(r) for r in routing])
    z = torch.stack([router_z_loss(r) for r in routing])
    weights = balance.new_tensor([r.config.load_balancing for r in routing])
    z_weights = balance.new_tensor([r.config.z_loss for r in routing])
    loss = (weights * balance + z_weights * z).mean()
    loads = [r.load() for r in routing]
    spread = torch.stack([load.std(correction=0) / load.mean() for load in loads])
    dropped = torch.stack([r.dropped.float().mean() for r in routing])
    return loss, {
        "router/load_balancing": float(balance.detach().mean()),
        "router/z": float(z.detach().mean()),
        "router/load_variation": float(spread.mean()),
        "router/dropped": float(dropped.mean()),
    }
