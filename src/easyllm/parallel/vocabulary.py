"""The vocabulary divided among tensor-parallel ranks: embedding, logits and cross-entropy.

Each rank holds V / size rows. The loss exchanges a few numbers per token instead of V logits:

    m = max over ranks of max_v z_v          Z = Σ over ranks of Σ_v exp(z_v - m)
    loss = log Z + m - z_y                   ∂loss/∂z_v = exp(z_v - m) / Z - [v = y]

(Shoeybi et al. 2019, arXiv 1909.08053, section 3)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from easyllm.ops.autograd import Context
from easyllm.ops.cross_entropy import IGNORE_INDEX, CrossEntropy, even_chunks, rows_of_chunk
from easyllm.parallel.mesh import Group


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The rows `low:high` of the vocabulary, which this rank holds.

    Attributes:
        group: the tensor-parallel ranks.
        low, high: the rank's token ids.
    """

    group: Group
    low: int
    high: int

    def rows(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Returns local row numbers [T] (0 for other ranks' tokens) and which tokens are ours."""
        mine = (token_ids >= self.low) & (token_ids < self.high)
        return torch.where(mine, token_ids - self.low, 0), mine

    def all_logits(self, logits: Tensor) -> Tensor:
        """Returns the logits of all tokens, [N, V], for this rank's `logits: [N, V / size]`."""
        return self.group.all_gather(logits.T.contiguous()).T

    def cross_entropy(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        softcap: float | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        max_z_loss: float = 0.0,
    ) -> CrossEntropy:
        """Returns the summed cross-entropy, the same on all ranks; see `linear_cross_entropy`.

        Args:
            hidden: [T, D], the same on all ranks; its gradient is this rank's term of the sum.
            weight: [V / size, D], this rank's rows.
            labels: [T] int64, token ids of the full vocabulary, or -100.
            softcap, label_smoothing, z_loss, max_z_loss: as there.
        """
        rows = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        if rows.numel() < labels.numel():
            hidden, labels = hidden.index_select(0, rows), labels.index_select(0, rows)
        terms = _Terms(softcap, label_smoothing, z_loss, max_z_loss)
        total: Tensor = _CrossEntropy.apply(hidden, weight, labels, self, terms)
        return CrossEntropy(total, rows.numel())


@dataclass(frozen=True, slots=True)
class _Terms:
    softcap: float | None
    smoothing: float
    z_loss: float
    max_z_loss: float


def _error(
    logits: Tensor, labels: Tensor, shard: Vocabulary, terms: _Terms
) -> tuple[Tensor, Tensor]:
    """Returns the losses [n] and ∂loss/∂logits [n, V / size] of this rank's logits before a cap."""
    capped = None
    if terms.softcap is not None:
        capped = torch.tanh(logits / terms.softcap)
        logits = terms.softcap * capped
    own = logits.max(-1)
    highest = shard.group.all_reduce(own.values.clone(), largest=True)
    index, mine = shard.rows(labels)
    target = torch.where(mine, logits.gather(1, index[:, None]).squeeze(1), 0)
    powers = (logits - highest[:, None]).exp_()
    sums = shard.group.all_reduce(torch.stack([powers.sum(-1), target, logits.sum(-1)]))
    log_z, target = sums[0].log() + highest, sums[1]
    loss = log_z - (1 - terms.smoothing) * target + terms.z_loss * log_z.square()
    vocab_size = (shard.high - shard.low) * shard.group.size
    if terms.smoothing:
        loss -= terms.smoothing * sums[2] / vocab_size
    error = powers.mul_(((1 + 2 * terms.z_loss * log_z) / sums[0])[:, None])
    if terms.smoothing:
        error -= terms.smoothing / vocab_size
    hit = torch.where(mine, terms.smoothing - 1.0, 0.0).to(error.dtype)
    error.scatter_add_(1, index[:, None], hit[:, None])
    if terms.max_z_loss:
        loss += terms.max_z_loss * highest.square()
        slope = torch.where(own.values == highest, 2 * terms.max_z_loss * highest, 0)
        error.scatter_add_(1, own.indices[:, None], slope[:, None])
    if capped is not None:
        error *= 1 - capped.square()
    return loss, error


class _CrossEntropy(torch.autograd.Function):
    """Computes the gradients together with the loss, chunk by chunk, as `linear_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Context,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        shard: Vocabulary,
        terms: _Terms,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        chunk = rows_of_chunk(
            vocab_size=len(weight), itemsize=wide.itemsize, device_type=hidden.device.type
        )
        chunk = even_chunks(len(hidden), chunk)
        to_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        matrix = weight.to(hidden.dtype)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = (hidden[rows] @ matrix.T).to(wide)
            loss, error = _error(logits, labels[rows], shard, terms)
            total += loss.sum(dtype=torch.float64)
            narrow = error.to(hidden.dtype)
            if to_hidden is not None:
                to_hidden[rows] = narrow @ matrix
            if to_weight is not None:
                to_weight += narrow.T @ hidden[rows]
        ctx.save_for_backward(to_hidden, to_weight)
        ctx.weight_dtype = weight.dtype
        return total.to(wide)

    @staticmethod
    def backward(
        ctx: Context, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        to_hidden, to_weight = ctx.saved_tensors
        return (
            None if to_hidden is None else to_hidden * grads[0],
            None if to_weight is None else (to_weight * grads[0]).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


__all__ = ["Vocabulary"]
