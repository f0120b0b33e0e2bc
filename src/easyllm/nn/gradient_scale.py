"""An identity whose gradient is scaled: GLM-130B shrinks that of the embedding.

    embedding = α · embedding + (1 - α) · embedding.detach()

(Zeng et al. 2022, arXiv 2210.02414, section 3.3.) The gradient of the first layers is much larger
than that of the others early in training, and its spikes are where losses diverge.
"""

import torch
from torch import Tensor, nn

from easyllm.ops.autograd import Context


class GradientScale(nn.Module):
    """Returns its input; the gradient is multiplied by `factor`, 1 by default."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Returns `x`."""
        if self.factor == 1 or not x.requires_grad:
            return x
        scaled: Tensor = _Scaled.apply(x, self.factor)
        return scaled


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


__all__ = ["GradientScale"]
