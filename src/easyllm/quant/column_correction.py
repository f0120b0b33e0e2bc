"""Rounds a weight column by column, and corrects the columns that are still to come.

The core of GPTQ (Frantar et al. 2022, arXiv 2210.17323, algorithm 1), for any set of values that a
column can be rounded to. The error of column i, divided by the diagonal of the upper Cholesky
factor U of H⁻¹, is subtracted from the later columns in proportion to row i of U, which minimises
‖(W' − W) X‖² given the columns that are already rounded. H = X Xᵀ.
"""

from typing import Protocol

import torch
from torch import Tensor

from easyllm.core.errors import ConfigError

BLOCK = 128
"""Columns that are corrected one by one; later ones are corrected once a block."""
MAX_DAMPING = 1.0


class RoundColumn(Protocol):
    """Rounds one column."""

    def __call__(self, index: int, rest: Tensor) -> tuple[Tensor, Tensor]:
        """Returns codes [N] of a column and the values [N] that they stand for.

        Args:
            index: the column's number in the order of rounding.
            rest: [n, N], the column and those after it in its block, corrected so far.
        """


def checked_hessian(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Returns H [K, K] fp64 with 1 on the diagonal for unused inputs, and the order [K] of columns.

    Inputs that are zero in all rows are unused: their weights do not matter. The order is that of
    falling diag(H), unused inputs last (activation order).

    Args:
        gram: [K, K], Σ x xᵀ over the calibration rows.

    Raises:
        ConfigError: `gram` is not finite.
    """
    hessian = gram.double().clone()
    if not bool(hessian.isfinite().all()):
        raise ConfigError("the calibration statistics contain NaN or Inf; check the model")
    diagonal = hessian.diagonal()
    unused = diagonal == 0
    diagonal[unused] = 1
    order = diagonal.masked_fill(unused, 0).argsort(descending=True, stable=True)
    return hessian, order


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Returns the upper Cholesky factor [K, K] fp32 of H⁻¹, with more damping where it fails.

    Args:
        hessian: [K, K] fp64.
        damping: share of the mean of diag(H) that is added to it.

    Raises:
        ConfigError: H is not positive definite with any damping.
    """
    mean = hessian.diagonal().mean()
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed.item():
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed.item():
            found: Tensor = upper.float()
            return found
        if damping >= MAX_DAMPING:
            raise ConfigError(
                "the calibration statistics are not positive definite; use more calibration text"
            )
        damping = min(max(10 * damping, 1e-4), MAX_DAMPING)


def round_columns(
    columns: Tensor, factor: Tensor, round_column: RoundColumn, *, block: int = BLOCK
) -> Tensor:
    """Returns the codes [K, N] of all columns, in their order.

    Args:
        columns: [K, N] fp32, the transposed weight, so that a column is contiguous; overwritten.
        factor: [K, K] fp32, upper Cholesky factor of H⁻¹ in the same order.
        round_column: rounds a column.
        block: columns that are corrected one by one.
    """
    codes = torch.empty_like(columns)
    for first in range(0, len(columns), block):
        part = columns[first : first + block]
        errors = torch.empty_like(part)
        last = first + len(part)
        own = factor[first:last, first:last]
        for i in range(len(part)):
            codes[first + i], values = round_column(first + i, part[i:])
            errors[i] = (part[i] - values) / own[i, i]
            part[i + 1 :].addr_(own[i, i + 1 :], errors[i], alpha=-1)
        columns[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
    return codes


__all__ = ["BLOCK", "RoundColumn", "checked_hessian", "inverse_factor", "round_columns"]
