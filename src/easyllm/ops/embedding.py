"""Embedding lookup; the gradient of the table is dense, with few rows that are not zero."""

import torch
from torch import Tensor
from torch.nn import functional as F

from easyllm.ops.autograd import Context
from easyllm.ops.huge_memory import cached_empty


def embedding(token_ids: Tensor, weight: Tensor) -> Tensor:
    """Returns `weight[token_ids]`; differentiable with respect to `weight`.

    Args:
        token_ids: [...] int; weight: [V, D].

    Returns:
        [..., D].
    """
    trained = torch.is_grad_enabled() and weight.requires_grad
    if weight.device.type != "cpu" or torch.compiler.is_compiling() or not trained:
        return F.embedding(token_ids, weight)
    out: Tensor = _Embedding.apply(token_ids, weight)
    return out


class _Embedding(torch.autograd.Function):
    """A backward pass for CPUs that caches the gradient's buffer for reuse.

    PyTorch spends most of its backward pass on fresh memory for the zeros of a large vocabulary.
    """

    @staticmethod
    def forward(ctx: Context, token_ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(token_ids)
        ctx.shape = weight.shape
        return F.embedding(token_ids, weight)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[None, Tensor]:
        (token_ids,), (grad,) = ctx.saved_tensors, grads
        used, number = token_ids.unique(return_inverse=True)
        rows = torch.ops.aten.embedding_dense_backward(grad, number, len(used), -1, False)
        table = cached_empty(tuple(ctx.shape), grad.dtype).zero_()
        table[used] = rows
        return None, table
