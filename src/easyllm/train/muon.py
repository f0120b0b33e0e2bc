"""Muon: momentum SGD whose update matrix is replaced by the nearest semi-orthogonal matrix.

See Jordan et al. 2024, kellerjordan.github.io/posts/muon.

    B ← μ B + G;   U = G + μ B (Nesterov) or B
    W ← W − η λ W − η · 0.2 √max(out, in) · NS(U)
    (Liu et al. 2025, arXiv 2502.16982, section 2.2)

A semi-orthogonal [out, in] matrix has a root mean square of 1/√max(out, in), and AdamW's update one
of about 0.2. The factor equalises the two, so that a learning rate and a weight decay that suit
AdamW also suit Muon.
"""

import math

import torch
from torch import Tensor

from easyllm.core.device import bf16_is_fast
from easyllm.train.optim_config import MuonConfig
from easyllm.train.update_rules import State, WeightUpdate

QUINTIC = (3.4445, -4.7750, 2.0315)
"""a, b, c of x ← a x + b x³ + c x⁵: Jordan's coefficients, which have the steepest slope at 0 that
keeps singular values near 1."""
ADAMW_RMS = 0.2
"""Typical root mean square of AdamW's update (arXiv 2502.16982, section 2.2)."""


class Muon:
    """Muon update rule, for matrices inside the layers.

    Args:
        config: Muon's hyperparameters.
    """

    def __init__(self, config: MuonConfig) -> None:
        self.config = config

    def new_state(self, master: Tensor) -> State:
        """Returns a zero momentum buffer of the master's shape and dtype."""
        return {"momentum": torch.zeros_like(master)}

    def update(self, weight: WeightUpdate, state: State) -> None:
        """Applies one Muon step to the master weight, its copy and the momentum, in place."""
        master, gradient = weight.master, weight.whole()
        momentum = state["momentum"].mul_(self.config.momentum).add_(gradient)
        direction = momentum
        if self.config.nesterov:
            direction = gradient.add(momentum, alpha=self.config.momentum)
        update = orthogonalise(direction, self.config.newton_schulz_steps)
        if weight.weight_decay:
            master.mul_(1 - weight.learning_rate * weight.weight_decay)
        scale = ADAMW_RMS * math.sqrt(max(master.shape))
        master.add_(update, alpha=-weight.learning_rate * scale)
        weight.round()


def orthogonalise(matrix: Tensor, steps: int, dtype: torch.dtype | None = None) -> Tensor:
    """Returns approximately U Vᵀ for `matrix: [out, in]` = U S Vᵀ, by Newton-Schulz iteration.

    The singular values of the result are between 0.68 and 1.2 rather than exactly 1.

    Args:
        matrix: [out, in].
        steps: number of iterations; 5 bring singular values above 0.003 of the largest into that
            range.
        dtype: dtype of the matrix products (GEMMs); by default bf16 on hardware with fast bf16 (as
            in the original), else fp32.

    Returns:
        [out, in] in that dtype.
    """
    if dtype is None:
        dtype = torch.bfloat16 if bf16_is_fast(matrix.device) else torch.float32
    a, b, c = QUINTIC
    norm: Tensor = torch.linalg.vector_norm(matrix).clamp_min(torch.finfo(matrix.dtype).tiny)
    x: Tensor = (matrix / norm).to(dtype)  # bounds all singular values by 1
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x  # for the smaller of the two Gram matrices
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
