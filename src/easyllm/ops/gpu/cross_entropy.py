"""Cross-entropy of each row and its gradient in Triton.

The kernel makes two passes over the logits, of which the second overwrites them with the gradient.

loss = log Z - (1 - ε) l_y - ε mean(l) + z log²Z
∂loss/∂l = softmax(l) (1 + 2 z log Z) - ε/V - (1 - ε) onehot(y)
l = cap · tanh(logit / cap), if capped
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _capped(x, cap, CAPPED: tl.constexpr):
    """Returns cap · tanh(x / cap), with an exponential that cannot overflow."""
    if CAPPED:
        small = tl.exp(-2.0 * tl.abs(x) / cap)
        return tl.where(x < 0, -cap, cap) * (1.0 - small) / (1.0 + small)
    return x


@triton.jit
def _kernel(
    logits,
    labels,
    loss,
    vocab,
    cap,
    smoothing,
    z_loss,
    CAPPED: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab
    label = tl.load(labels + row)
    target = _capped(tl.load(logits + label).to(tl.float32), cap, CAPPED)
    most = tl.full([BLOCK], -float("inf"), dtype=tl.float32)
    mass = tl.zeros([BLOCK], dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, vocab, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        ok = columns < vocab
        values = tl.load(logits + columns, mask=ok, other=0.0).to(tl.float32)
        values = _capped(values, cap, CAPPED)
        total += tl.where(ok, values, 0.0)
        values = tl.where(ok, values, -float("inf"))
        higher = tl.maximum(most, values)
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        mass = mass * tl.exp(most - safe) + tl.exp(values - safe)
        most = higher
    top = tl.max(most, axis=0)
    mass_of_row = tl.sum(mass * tl.exp(most - top), axis=0)
    over_top = tl.log(mass_of_row)  # log Z minus the largest logit, which may be large
    log_z = top + over_top
    mean = tl.sum(total, axis=0) / vocab
    kept = 1.0 - smoothing
    nats = kept * (top - target + over_top) + smoothing * (top - mean + over_top)
    tl.store(loss + row, nats + z_loss * log_z * log_z)
    if WITH_GRAD:
        for first in range(0, vocab, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            ok = columns < vocab
            values = tl.load(logits + columns, mask=ok, other=0.0).to(tl.float32)
            capped = _capped(values, cap, CAPPED)
            chance = tl.exp(tl.where(ok, capped - top, 0.0)) / mass_of_row
            error = chance * (1.0 + 2.0 * z_loss * log_z) - smoothing / vocab
            error -= tl.where(columns == label, kept, 0.0)
            if CAPPED:
                error *= 1.0 - (capped / cap) * (capped / cap)
            tl.store(logits + columns, error.to(logits.dtype.element_ty), mask=ok)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    with_grad: bool,
) -> Tensor:
    """Returns the loss of each row.

    Args:
        logits: [N, V] contiguous, before any soft cap; overwritten by its gradient if `with_grad`.
        labels: [N] int64, each an id of the vocabulary.
        softcap: cap of the logits; None for none.
        label_smoothing: ε.
        z_loss: coefficient of log²Z.
        with_grad: whether to compute the gradient.

    Returns:
        [N] fp32, in nats.
    """
    loss = torch.empty(len(labels), dtype=torch.float32, device=logits.device)
    _kernel[(len(labels),)](
        *(logits, labels.contiguous(), loss, logits.shape[1]),
        *(softcap or 1.0, label_smoothing, z_loss),
        CAPPED=softcap is not None,
        WITH_GRAD=with_grad,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return loss
