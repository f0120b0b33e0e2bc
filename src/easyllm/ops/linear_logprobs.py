"""Log-probability of each label under a linear head, differentiable, in chunks of logits.

    log p_t = h_t·w_{y_t} - logsumexp_v(h_t·w_v)

The forward pass computes the logits chunk by chunk; the backward pass computes them again, which
costs one matmul and saves [N, V] numbers. Unlike the summed `cross_entropy`, each row's value is
returned, for losses that depend on it in their own way.
"""

import torch
from torch import Tensor

from easyllm.ops.autograd import Context
from easyllm.ops.cross_entropy import even_chunks, rows_of_chunk, softmax_error
from easyllm.ops.matmul import matmul


def linear_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Returns the log-probability of each label under softmax(hidden @ weight.T).

    Args:
        hidden: [N, D], fp32, bf16 or fp16; N is at least 1.
        weight: [V, D], any float dtype.
        labels: [N] int64.

    Returns:
        [N] nats, fp32 (fp64 for fp64 logits); differentiable in `hidden` and `weight`.
    """
    found: Tensor = _LinearLogprobs.apply(hidden, weight, labels)
    return found


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, labels)
        cast, size = weight.to(hidden.dtype), _chunk(hidden, weight)
        losses = [
            softmax_error(matmul(h, cast.T), y, with_grad=False)[0]
            for h, y in zip(hidden.split(size), labels.split(size), strict=True)
        ]
        return -torch.cat(losses)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,), (hidden, weight, labels) = grads, ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        cast, size = weight.to(hidden.dtype), _chunk(hidden, weight)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grad_weight = weight.new_zeros(weight.shape, dtype=wide) if needs_weight else None
        for start in range(0, len(labels), size):
            rows = slice(start, start + size)
            _, error = softmax_error(matmul(hidden[rows], cast.T), labels[rows], with_grad=True)
            assert error is not None, "asked for"
            error *= -grad[rows, None].to(error.dtype)
            if grad_hidden is not None:
                matmul(error, cast, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += matmul(error.T, hidden[rows])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None


def _chunk(hidden: Tensor, weight: Tensor) -> int:
    most = rows_of_chunk(
        vocab_size=weight.shape[0],
        itemsize=hidden.dtype.itemsize,
        device_type=hidden.device.type,
    )
    return even_chunks(len(hidden), most)


__all__ = ["linear_logprobs"]
