"""Statistics of the inputs of a linear, from calibration text."""

from dataclasses import dataclass

import torch
from torch import Tensor

LONGEST = 4.0
"""The largest norm of a row in sums of products, as a multiple of the median norm."""


@dataclass(slots=True, kw_only=True)
class Statistics:
    """Sums over the input rows x: [K] of a linear.

    Language models give a few tokens, often the first of a sequence, activations that are a
    thousand times as large as those of all others (arXiv 2402.17762). Squared, they would be all
    that GPTQ and importance matrices see; so in products a row that is longer than `LONGEST` times
    the median is scaled to that length.

    Attributes:
        gram: [K, K] fp32, Σ x xᵀ of the scaled rows; None if only sums per input are wanted.
        square_sum: [K] fp32, Σ x² of the scaled rows: the diagonal of `gram`.
        abs_sum: [K] fp32, Σ |x|.
        abs_max: [K] fp32, max |x|.
        rows: number of rows.
    """

    gram: Tensor | None
    square_sum: Tensor
    abs_sum: Tensor
    abs_max: Tensor
    rows: int = 0

    @classmethod
    def empty(
        cls, inputs: int, *, gram: bool = True, device: torch.device | str = "cpu"
    ) -> "Statistics":
        """Returns the statistics of no rows."""
        return cls(
            gram=torch.zeros(inputs, inputs, device=device) if gram else None,
            square_sum=torch.zeros(inputs, device=device),
            abs_sum=torch.zeros(inputs, device=device),
            abs_max=torch.zeros(inputs, device=device),
        )

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Adds rows `x: [..., K]`; the median norm is that of these rows."""
        rows = x.reshape(-1, x.shape[-1]).float()
        if not len(rows):
            return
        scaled = _scaled(rows)
        if self.gram is not None:
            self.gram.addmm_(scaled.T, scaled)
        magnitudes = rows.abs()
        self.square_sum += scaled.square().sum(0)
        self.abs_sum += magnitudes.sum(0)
        self.abs_max = torch.maximum(self.abs_max, magnitudes.amax(0))
        self.rows += len(rows)

    def divided(self, factors: Tensor) -> "Statistics":
        """Returns the statistics of x / factors, for `factors: [K]` positive."""
        return Statistics(
            gram=None if self.gram is None else self.gram / factors / factors[:, None],
            square_sum=self.square_sum / factors.square(),
            abs_sum=self.abs_sum / factors,
            abs_max=self.abs_max / factors,
            rows=self.rows,
        )

    @property
    def mean_abs(self) -> Tensor:
        """The mean of |x|, [K]."""
        return self.abs_sum / max(self.rows, 1)


def _scaled(rows: Tensor) -> Tensor:
    """Returns the rows [R, K], the longest of them shortened to the norm that is allowed."""
    norms = rows.norm(dim=1)
    longer = norms[norms > 0]
    if not len(longer):
        return rows
    limit = LONGEST * longer.median()
    # a row with a norm that is not finite stays as it is, so that what it does to the sums is seen
    too_long = (norms > limit) & norms.isfinite()
    return torch.where(too_long[:, None], rows * (limit / norms)[:, None], rows)


def output_error(difference: Tensor, gram: Tensor) -> Tensor:
    """Returns Σ_t ‖(W' − W) x_t‖² for `difference: [N, K]` = W' − W and `gram: [K, K]` = Σ x xᵀ."""
    return ((difference @ gram) * difference).sum()


__all__ = ["Statistics", "output_error"]
