"""An output head whose rows are scaled to unit length (NormHead).

    logits = W' x,   w'_v = w_v / ‖w_v‖        (Yang et al. 2023, arXiv 2309.10305, section 2.6)

Rare tokens keep a norm that training no longer shrinks, and logits compare directions alone. The
scaled rows are computed in each forward pass of training, with their gradient, and once after that:
a model that is loaded has unit rows already, and its head is an ordinary linear layer.
"""

import torch
from torch import Tensor, nn

from easyllm.nn.linear import Linear
from easyllm.nn.storage import DenseWeight
from easyllm.ops.deterministic import fixed_order_linear
from easyllm.ops.kernels.structs import Matrix
from easyllm.ops.matmul import linear

SMALLEST_NORM = 1e-12
UNIT_ERROR = 1e-6
"""Rows are of unit length if their norms differ from 1 by at most this, or by the rounding of the
dtype."""


def unit_rows(weight: Tensor) -> Tensor:
    """Returns `weight: [N, K]` with rows of unit length, computed in fp32 or wider; differentiable.

    >>> unit_rows(torch.tensor([[3.0, 4.0]])).tolist()
    [[0.6000000238418579, 0.800000011920929]]
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return nn.functional.normalize(wide, dim=-1, eps=SMALLEST_NORM).to(weight.dtype)


def scaled_rows(weight: Tensor) -> Tensor:
    """Returns `weight: [N, K]` itself if its rows are of unit length, else `unit_rows` of it.

    So rows that have been scaled once keep their values.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    norms = torch.linalg.vector_norm(weight, dim=-1, dtype=wide)
    error = max(UNIT_ERROR, torch.finfo(weight.dtype).eps / 2)
    return weight if bool((norms - 1).abs().max() <= error) else unit_rows(weight)


class UnitRowsWeight(DenseWeight):
    """A full weight that is used with its rows scaled to unit length."""

    def __init__(self, parameters: dict[str, nn.Parameter | None]) -> None:
        super().__init__(parameters)
        self._scaled: tuple[object, Tensor] | None = None

    def linear(
        self, x: Tensor, bias: Tensor | None = None, *, deterministic: bool = False
    ) -> Tensor:
        """Returns x W'ᵀ + b, [..., N] for `x: [..., K]`, differentiable in all operands."""
        return (fixed_order_linear if deterministic else linear)(x, self.dense(), bias)

    def dense(self) -> Tensor:
        """Returns the scaled rows; the parameter itself if they are of unit length."""
        weight = self.weight
        if torch.is_grad_enabled() and weight.requires_grad:
            return unit_rows(weight)
        version = 0 if weight.is_inference() else weight._version
        state = weight.data_ptr(), version
        if self._scaled is None or self._scaled[0] != state:
            rows = scaled_rows(weight.detach())
            self._scaled = state, weight if rows.data_ptr() == weight.data_ptr() else rows
        return self._scaled[1]

    def kernel_matrix(self, bias: Tensor | None) -> Matrix | None:
        """Returns the weight for the C kernels; None if its rows are not of unit length."""
        return super().kernel_matrix(bias) if self.dense() is self.weight else None


class NormHead(Linear):
    """A linear layer whose weight is used with rows of unit length."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.storage = UnitRowsWeight(self._parameters)


__all__ = ["NormHead", "UnitRowsWeight", "scaled_rows", "unit_rows"]
