"""Log-probability of each target under a linear head, in chunks: logits [N, V] never exist at once.

    log p_n = h_n·w_{y_n} - logsumexp_v(h_n·w_v)

Unlike in `cross_entropy.linear_cross_entropy`, the weight of each token in the loss is not known
in the forward pass: a preference loss is a nonlinear function of sums over responses. Where only
`hidden` needs a gradient (an adapter is trained), the forward pass computes ∂log p_n/∂h_n and the
backward pass scales its rows. Where the head's weight is trained as well, the backward pass
computes the logits of each chunk again.
"""

import torch
from torch import Tensor

from easyllm.ops.autograd import Context
from easyllm.ops.cross_entropy import (
    ROW_MULTIPLE,
    even_chunks,
    logits_buffer,
    rows_of_chunk,
    softmax_error,
)
from easyllm.ops.matmul import matmul


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Returns log softmax(hidden @ weight.T) at the targets, [N] in nats, fp32 or wider.

    Args:
        hidden: [N, D], fp32, bf16 or fp16; the GEMMs run in its dtype, the softmax in fp32.
        weight: [V, D], any float dtype.
        targets: [N] int64, token ids below V.
        softcap: the logits are cap · tanh(product / cap) (Gemma 2).
        chunk_rows: maximum rows per chunk; by default as many as fit in 96 MiB of logits on a CPU
            and 512 MiB on a GPU.
    """
    count = targets.numel()
    compiled = hidden.device.type == "cpu" and hidden.dtype == torch.bfloat16
    if compiled and count % ROW_MULTIPLE and count:  # few distinct GEMM sizes: see ROW_MULTIPLE
        rows = torch.arange(count + -count % ROW_MULTIPLE).clamp(max=count - 1)
        hidden, targets = hidden.index_select(0, rows), targets.index_select(0, rows)
    chunk_rows = chunk_rows or rows_of_chunk(
        vocab_size=weight.shape[0], itemsize=hidden.dtype.itemsize, device_type=weight.device.type
    )
    chunk_rows = even_chunks(hidden.shape[0], chunk_rows)
    found: Tensor = _LinearLogprobs.apply(hidden, weight, targets, softcap, chunk_rows)
    return found[:count]


def _error(
    logits: Tensor, targets: Tensor, softcap: float | None, *, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns -log p [n] and its gradient with respect to the product; overwrites `logits`."""
    if softcap is None:
        return softmax_error(logits, targets, with_grad=with_grad)
    ratio = torch.tanh(logits / softcap)
    loss, error = softmax_error(softcap * ratio, targets, with_grad=with_grad)
    return loss, None if error is None else error * (1 - ratio.square())


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        softcap: float | None,
        chunk_rows: int,
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        keeps = needs_hidden and not needs_weight
        compute_weight = weight.to(hidden.dtype)
        found = hidden.new_empty(
            len(targets), dtype=torch.promote_types(hidden.dtype, torch.float32)
        )
        grad = torch.empty_like(hidden) if keeps else None
        buffer = logits_buffer(min(chunk_rows, len(targets)), weight.shape[0], hidden)
        for start in range(0, len(targets), chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = matmul(hidden[rows], compute_weight.T, out=buffer[: len(targets[rows])])
            loss, error = _error(logits, targets[rows], softcap, with_grad=keeps)
            found[rows] = -loss
            if grad is not None and error is not None:
                matmul(error, compute_weight, out=grad[rows])  # ∂(-log p)/∂h
        if keeps:
            ctx.save_for_backward(grad)
        else:
            ctx.save_for_backward(hidden, weight, targets)
        ctx.keeps, ctx.softcap, ctx.chunk_rows = keeps, softcap, chunk_rows
        return found

    @staticmethod
    def backward(
        ctx: Context, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        factor = -grads[0][:, None]  # of ∂(-log p)
        if ctx.keeps:
            (grad,) = ctx.saved_tensors
            return grad * factor.to(grad.dtype), None, None, None, None
        hidden, weight, targets = ctx.saved_tensors
        compute_weight = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = hidden.new_zeros(
            weight.shape, dtype=torch.promote_types(hidden.dtype, torch.float32)
        )
        buffer = logits_buffer(min(ctx.chunk_rows, len(targets)), weight.shape[0], hidden)
        for start in range(0, len(targets), ctx.chunk_rows):
            rows = slice(start, start + ctx.chunk_rows)
            logits = matmul(hidden[rows], compute_weight.T, out=buffer[: len(targets[rows])])
            _, error = _error(logits, targets[rows], ctx.softcap, with_grad=True)
            assert error is not None, "asked for"
            error = error * factor[rows].to(error.dtype)
            if grad_hidden is not None:
                matmul(error, compute_weight, out=grad_hidden[rows])
            matmul(error.T, hidden[rows], out=grad_weight, add=start > 0)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


__all__ = ["linear_logprobs"]
