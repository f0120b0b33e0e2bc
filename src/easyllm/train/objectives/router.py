"""The auxiliary losses of routers, which every objective adds for a model with experts.

    Σ loss + terms · mean over the MoE layers of (λ_b · load balancing + λ_z · z)

The coefficients are the model's own. A router that is trained without them may come to prefer a few
experts, whatever the objective (Fedus et al. 2021, arXiv 2101.03961, section 2.2; Zoph et al. 2022,
arXiv 2202.08906, section 3.2).
"""

import torch
from torch import Tensor

from easyllm.nn.decoder import Decoder
from easyllm.nn.moe import Routing, load_balancing_loss, router_z_loss
from easyllm.train.objectives.losses import LossOutput


def routing_of(model: Decoder) -> list[Routing] | None:
    """Returns a list in which a forward pass collects its routing; None without experts."""
    return [] if model.config.has_experts else None


def with_router_losses(output: LossOutput, routing: list[Routing] | None) -> LossOutput:
    """Returns the loss of a batch with the router losses of its forward pass added.

    Args:
        output: the loss, whose number of terms scales the router losses.
        routing: what the forward pass has collected; None without experts.
    """
    if not routing:
        return output
    loss, metrics = router_losses(routing)
    more = loss * output.num_tokens
    if output.auxiliary is not None:
        more = more + output.auxiliary
    return LossOutput(
        output.sum, output.num_tokens, more, {**output.metrics, **metrics}, output.counts
    )


def router_losses(routing: list[Routing]) -> tuple[Tensor, dict[str, float]]:
    """Returns the routers' loss per token, and router metrics.

    The losses of a batch are means over the MoE layers, as in Hugging Face; over the micro-batches
    of a step, they are averaged by terms. The load-balancing loss is a product of batch means, so
    it is the only loss that depends on how a step is split into micro-batches.
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


__all__ = ["router_losses", "routing_of", "with_router_losses"]
