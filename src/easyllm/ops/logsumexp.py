"""The logarithm of the sum of exponentials of each row of logits.

PyTorch divides the sum of one long row among threads, but not those of many rows, so its rounding
depends on both numbers. The C kernel sums each row in one order, whatever the other rows and the
number of threads.
"""

import torch
from torch import Tensor

from easyllm.ops.autograd import Context
from easyllm.ops.kernels import kernels_for
from easyllm.ops.kernels.structs import DTYPE_CODES


def logsumexp(logits: Tensor) -> Tensor:
    """Returns log Σ exp of each row of `logits: [N, V]`, [N]; differentiable.

    Logits of -inf are excluded; a row with a NaN is NaN. The result is fp32, or of the logits'
    dtype where the kernel does not support them.
    """
    if kernels_for(logits) is None or not logits.is_contiguous() or not logits.shape[1]:
        return logits.logsumexp(-1)
    if torch.is_grad_enabled() and logits.requires_grad:
        found: Tensor = _LogSumExp.apply(logits)
        return found
    return _rows(logits)


def _rows(logits: Tensor) -> Tensor:
    kernels = kernels_for(logits)
    assert kernels is not None, "checked by logsumexp()"
    out = torch.empty(len(logits))
    code = DTYPE_CODES[logits.dtype]
    kernels.logsumexp(logits.data_ptr(), code, *logits.shape, out.data_ptr())
    return out


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, logits: Tensor) -> Tensor:
        out = _rows(logits)
        ctx.save_for_backward(logits, out)
        return out

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> Tensor:
        (grad,), (logits, out) = grads, ctx.saved_tensors
        softmax: Tensor = (logits - out[:, None]).exp()
        return (softmax * grad[:, None]).to(logits.dtype)


__all__ = ["logsumexp"]
