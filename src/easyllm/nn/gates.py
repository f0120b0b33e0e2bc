"""How a mixture selects experts in training: what is added to the router, beyond its top k.

In inference all gates are the plain one, so results do not depend on chance.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from easyllm.nn.context import ForwardContext
from easyllm.nn.cost import Activation, CostTrace
from easyllm.nn.linear import Linear


class PlainGate(nn.Module):
    """The top k of the router."""

    def disturbed(
        self,
        logits: Tensor,
        x: Tensor,  # noqa: ARG002 - for the others
        context: ForwardContext,  # noqa: ARG002 - for the others
    ) -> Tensor:
        """Returns the logits unchanged."""
        return logits

    def skipped(self, weights: Tensor) -> Tensor | None:  # noqa: ARG002 - for the others
        """Returns None."""
        return None

    def cost(self, trace: CostTrace, x: Activation) -> None:
        """Records nothing."""


class NoisyGate(PlainGate):
    """Noisy top-k: logits + N(0, 1) · softplus(W_noise x) (Shazeer et al. 2017, arXiv 1701.06538).

    See eqs. 3 to 5.
    """

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.noise = Linear(hidden_size, num_experts)

    def disturbed(self, logits: Tensor, x: Tensor, context: ForwardContext) -> Tensor:
        """Returns the logits with noise in training."""
        if not self.training:
            return logits
        return logits + torch.randn_like(logits) * F.softplus(self.noise.wide(x, context))

    def cost(self, trace: CostTrace, x: Activation) -> None:
        """Records the width of the noise and the noise."""
        scale = trace.linear(self.noise, "noise", x, part="router")
        if scale.grad:
            trace.keep_all(scale, Activation("noise.normal", scale.nbytes, grad=True))


class RandomSecondGate(PlainGate):
    """GShard's second expert: used with a probability of twice its weight (arXiv 2006.16668).

    See section 2.2: a small second weight contributes little, and its place in the expert's
    capacity goes to others. The weight is that among the chosen experts.
    """

    def skipped(self, weights: Tensor) -> Tensor | None:
        """Returns the choices after the first that chance leaves out, in training."""
        if not self.training:
            return None
        shares = weights.detach() / weights.detach().sum(-1, keepdim=True)
        skipped = torch.rand_like(shares) >= 2 * shares
        skipped[:, 0] = False
        return skipped


def build_gate(kind: str, hidden_size: int, num_experts: int) -> PlainGate:
    """Returns the gate of a configuration (`MoEConfig.gate`)."""
    match kind:
        case "noisy_top_k":
            return NoisyGate(hidden_size, num_experts)
        case "random_second":
            return RandomSecondGate()
    return PlainGate()


__all__ = ["NoisyGate", "PlainGate", "RandomSecondGate", "build_gate"]
