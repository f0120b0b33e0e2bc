"""The critic's loss: squared error to the returns, with values that may move by a bounded amount.

    L = ½ max( (V - R)²,  (clip(V, V_old - ε, V_old + ε) - R)² )

Schulman et al. 2017's implementation of PPO (arXiv 1707.06347); Huang et al. 2024, arXiv
2403.17031, detail 12.
"""

import torch
from torch import Tensor


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None = 0.2
) -> tuple[Tensor, Tensor]:
    """Returns the loss of each token, and whether its value was clipped.

    Args:
        values: [N], the critic's predictions; differentiable.
        old_values: [N], those at the time of the rollout.
        returns: [N], the targets.
        clip: ε; None disables clipping.

    Returns:
        [N] losses and [N] bool.
    """
    error = (values - returns).square()
    if clip is None:
        return 0.5 * error, torch.zeros_like(values, dtype=torch.bool)
    limited = torch.maximum(torch.minimum(values, old_values + clip), old_values - clip)
    bounded = (limited - returns).square()
    return 0.5 * torch.maximum(error, bounded), bounded > error


__all__ = ["value_loss"]
