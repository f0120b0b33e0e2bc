"""Differences between sampler and trainer: three policies, of which two should be equal.

    rollout   the policy that sampled, as the engine computed it (quantized, other kernels ...)
    old       the same weights in the trainer
    current   the weights being updated

The policy loss compares current with old. If old differs from rollout, the gradient is biased;
weights w = min(π_old / π_rollout, cap) correct it in expectation, up to the truncation (Yao et al.
2025, "Your efficient RL framework secretly brings you off-policy RL training"), or tokens with an
extreme ratio are left out of loss and divisor.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from easyllm.rl.experience import Experience
from easyllm.rl.kl import MAX_EXPONENT


def importance_weights(old: Tensor, rollout: Tensor, cap: float) -> Tensor:
    """Returns min(π_old / π_rollout, cap) for each token, without a gradient."""
    difference = (old - rollout).detach().clamp(-MAX_EXPONENT, MAX_EXPONENT)
    return difference.exp().clamp(max=cap)


def mismatch_figures(experiences: Sequence[Experience]) -> dict[str, float]:
    """Returns the differences between the trainer's and the sampler's log-probabilities."""
    parts = [each.tokens["old_logprobs"] - each.tokens["rollout_logprobs"] for each in experiences]
    difference = torch.cat(parts)
    if not len(difference):
        return {}
    return {
        "rl/mismatch_nats": float(difference.abs().mean()),
        "rl/mismatch_max_nats": float(difference.abs().max()),
    }


def mark_mismatched(experiences: Sequence[Experience], cap: float) -> dict[str, float]:
    """Takes tokens whose ratio is above `cap` or below 1 / `cap` out of the loss.

    Returns:
        The share of such tokens.
    """
    dropped = total = 0
    for each in experiences:
        ratio = (each.tokens["old_logprobs"] - each.tokens["rollout_logprobs"]).exp()
        kept = (ratio <= cap) & (ratio >= 1 / cap)
        each.tokens["kept"] = kept
        dropped, total = dropped + int((~kept).sum()), total + each.length
    return {"rl/mismatch_masked_share": dropped / max(1, total)}


__all__ = ["importance_weights", "mark_mismatched", "mismatch_figures"]
