"""Estimates of KL(π ‖ π_ref) from sampled tokens, and controllers of its coefficient.

With r = log π_ref(y) - log π(y) for a token y sampled from π (Schulman 2020, "Approximating KL
divergence"):

    k1 = -r              unbiased, negative for some tokens
    k2 = r² / 2          biased, low variance; its gradient is that of the KL
    k3 = eʳ - r - 1      unbiased, never negative

As a term of a differentiated loss, k1 is useless: E[∇ log π] = 0, so its expected gradient is 0.
In the reward, k1 is the usual choice, because no gradient flows through it.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]
MAX_EXPONENT = 20.0
"""Bound on |r| where it is exponentiated: e²⁰ is 5e8, beyond it gradients only overflow."""


def kl_estimate(logprobs: Tensor, reference: Tensor, estimator: Estimator) -> Tensor:
    """Returns the estimate of KL(π ‖ π_ref) at each token, in nats.

    Args:
        logprobs: log π, any shape; differentiable.
        reference: log π_ref, the same shape.
        estimator: see the module.
    """
    ratio = reference - logprobs
    match estimator:
        case "k1":
            return -ratio
        case "k2":
            return 0.5 * ratio.square()
    ratio = ratio.clamp(-MAX_EXPONENT, MAX_EXPONENT)
    return torch.exp(ratio) - ratio - 1.0


@dataclass(slots=True)
class KLController:
    """The coefficient β of the KL term: constant, or adapted so that the KL approaches a target.

    The adaptation is β ← β (1 + 0.1 · clip(KL / target - 1, -0.2, 0.2)) after each rollout (Ziegler
    et al. 2019, arXiv 1909.08593, section 2.2).

    Attributes:
        coefficient: β.
        target: the KL in nats per answer that β is adapted to; None keeps β constant.
    """

    coefficient: float
    target: float | None = None

    def update(self, kl_nats: float) -> None:
        """Adapts β to the mean KL of the last rollout, in nats per answer."""
        if self.target is not None:
            error = min(max(kl_nats / self.target - 1.0, -0.2), 0.2)
            self.coefficient *= 1.0 + 0.1 * error


__all__ = ["Estimator", "KLController", "kl_estimate"]
