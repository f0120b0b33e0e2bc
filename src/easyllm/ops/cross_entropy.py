"""Cross-entropy of a linear head in chunks, so that the full logits [T, V] are never materialized.

    loss = Σ_t  logsumexp_v(h_t·w_v) - h_t·w_{y_t}        over tokens with y_t ≠ -100

The gradient is computed together with the loss, chunk by chunk (∂loss/∂logits = softmax - onehot),
so the backward pass only scales it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from easyllm.ops.autograd import Context
from easyllm.ops.gpu import triton_unsupported_reason
from easyllm.ops.huge_memory import cached_empty
from easyllm.ops.kernels import kernels_for
from easyllm.ops.kernels.structs import DTYPE_CODES
from easyllm.ops.matmul import is_row_major, matmul

IGNORE_INDEX = -100
"""Label of a token that is excluded from the loss."""
CHUNK_BYTES = 96 * 2**20
"""Maximum size of a chunk of logits on a CPU."""
GPU_CHUNK_BYTES = 2**29
"""Maximum size of a chunk of logits on a GPU."""
ROW_MULTIPLE = 32
"""Row counts are rounded up to a multiple of this.

bf16 GEMMs on a CPU are compiled for each number of rows, which takes several milliseconds each, so
only a few distinct numbers should occur.
"""


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """Summed loss in nats (a differentiable scalar) and the number of tokens in the sum."""

    sum: Tensor
    num_tokens: int


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    max_z_loss: float = 0.0,
    chunk_rows: int | None = None,
) -> CrossEntropy:
    """Returns the summed cross-entropy of the logits `hidden @ weight.T` against `labels`.

    Args:
        hidden: [T, D], fp32, bf16 or fp16; the GEMMs run in its dtype, the softmax in fp32.
        weight: [V, D], any float dtype.
        labels: [T] int64; -100 for tokens excluded from the loss.
        softcap: the logits are cap · tanh(product / cap) (Gemma 2).
        label_smoothing: ε, the share of the target spread evenly over the vocabulary; the loss is
            (1 - ε) · -log p_y + ε · mean_v(-log p_v) (arXiv 1512.00567, section 7).
        z_loss: coefficient of logsumexp², added to the loss (arXiv 2204.02311, section 5).
        max_z_loss: coefficient of the largest logit squared (Baichuan 2: arXiv 2309.10305,
            section 2.6).
        chunk_rows: maximum rows per chunk; by default as many as fit in 96 MiB of logits on a CPU
            and 512 MiB on a GPU.

    Returns:
        The sum over labelled tokens and their number; with no labelled token the sum is 0.
    """
    rows = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    num_tokens = rows.numel()
    compiled = hidden.device.type == "cpu" and hidden.dtype == torch.bfloat16
    filled = -num_tokens % ROW_MULTIPLE if compiled else 0
    if filled or num_tokens < labels.numel():
        rows = torch.cat([rows, rows[:1].expand(filled)])  # padding; its gradient is set to 0
        hidden, labels = hidden.index_select(0, rows), labels.index_select(0, rows)
    chunk_rows = chunk_rows or rows_of_chunk(
        vocab_size=weight.shape[0], itemsize=hidden.dtype.itemsize, device_type=weight.device.type
    )
    shape = _Shape(softcap, label_smoothing, z_loss, max_z_loss)
    total = _LinearCrossEntropy.apply(hidden, weight, labels, num_tokens, shape, chunk_rows)
    return CrossEntropy(total, num_tokens)


def rows_of_chunk(*, vocab_size: int, itemsize: int, device_type: str) -> int:
    """Returns the maximum rows of a chunk of logits [rows, V] on a device type (`cpu`, `cuda`)."""
    workspace = GPU_CHUNK_BYTES if device_type == "cuda" else CHUNK_BYTES
    return max(1, workspace // (itemsize * vocab_size))


def even_chunks(count: int, most: int) -> int:
    """Returns the rows per chunk that split `count` rows into the fewest, evenly sized chunks.

    A chunk has at most `most` rows and, where possible, a multiple of `ROW_MULTIPLE`.

    >>> even_chunks(1300, 1024), even_chunks(850, 1024)
    (672, 864)
    """
    if not count:
        return 1
    size = -(-count // -(-count // most))
    return min(-(-size // ROW_MULTIPLE) * ROW_MULTIPLE, most) if most >= ROW_MULTIPLE else size


def softmax_error(
    logits: Tensor, labels: Tensor, *, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns each row's loss and ∂loss/∂logits = softmax - onehot; may overwrite `logits`.

    Args:
        logits: [N, V]; labels: [N] int64.
        with_grad: whether to compute the gradient.

    Returns:
        [N] losses in nats, fp32 (fp64 for fp64 logits), and the gradient [N, V] in the dtype of
        `logits`, None without `with_grad`.
    """
    if triton_unsupported_reason(logits) is None and logits.is_contiguous():
        return _on_gpu(logits, labels, _Shape(None, 0.0, 0.0), with_grad=with_grad)
    kernels = kernels_for(logits) if is_row_major(logits) else None
    if kernels is not None:
        loss = torch.empty(len(labels))
        kernels.cross_entropy(
            logits.data_ptr(),
            logits.stride(0),
            DTYPE_CODES[logits.dtype],
            labels.contiguous().data_ptr(),
            loss.data_ptr(),
            *logits.shape,
            with_grad,
        )
        return loss, logits if with_grad else None
    wide = logits if logits.dtype == torch.float64 else logits.float()
    log_z = wide.logsumexp(-1, keepdim=True)
    target = wide.gather(1, labels[:, None])
    if not with_grad:
        return (log_z - target).squeeze(1), None
    error = (wide - log_z).exp_()
    error.scatter_add_(1, labels[:, None], torch.full_like(target, -1.0))
    return (log_z - target).squeeze(1), error.to(logits.dtype)


class _Shape(NamedTuple):
    """Terms of the loss in addition to -log p."""

    softcap: float | None
    label_smoothing: float
    z_loss: float
    max_z_loss: float = 0.0


def _error(
    grouped_matmul: Tensor, labels: Tensor, shape: _Shape, *, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns each row's loss and its gradient with respect to the logits before any soft cap."""
    fused = not shape.max_z_loss and grouped_matmul.is_contiguous()
    if fused and triton_unsupported_reason(grouped_matmul) is None:
        return _on_gpu(grouped_matmul, labels, shape, with_grad=with_grad)
    if shape == (None, 0.0, 0.0, 0.0):
        return softmax_error(grouped_matmul, labels, with_grad=with_grad)
    logits = grouped_matmul if grouped_matmul.dtype == torch.float64 else grouped_matmul.float()
    capped = None
    if shape.softcap is not None:
        capped = torch.tanh(logits / shape.softcap)
        logits = shape.softcap * capped
    log_z = logits.logsumexp(-1, keepdim=True)
    target = logits.gather(1, labels[:, None])
    smooth = shape.label_smoothing
    loss = log_z - (1 - smooth) * target + shape.z_loss * log_z.square()
    if smooth:
        loss -= smooth * logits.mean(-1, keepdim=True)
    largest = logits.max(-1, keepdim=True) if shape.max_z_loss else None
    if largest is not None:
        loss = loss + shape.max_z_loss * largest.values.square()
    if not with_grad:
        return loss.squeeze(1), None
    error = (logits - log_z).exp_() * (1 + 2 * shape.z_loss * log_z)
    error -= smooth / logits.shape[1]
    error.scatter_add_(1, labels[:, None], torch.full_like(target, smooth - 1.0))
    if largest is not None:
        slope = 2 * shape.max_z_loss * largest.values
        error.scatter_add_(1, largest.indices, slope)
    if capped is not None:
        error *= 1 - capped.square()
    return loss.squeeze(1), error.to(grouped_matmul.dtype)


def _on_gpu(
    grouped_matmul: Tensor, labels: Tensor, shape: _Shape, *, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    from easyllm.ops.gpu.cross_entropy import cross_entropy

    terms = {name: value for name, value in shape._asdict().items() if name != "max_z_loss"}
    loss = cross_entropy(grouped_matmul, labels, **terms, with_grad=with_grad)
    return loss, grouped_matmul if with_grad else None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        num_tokens: int,
        shape: "_Shape",
        chunk_rows: int,
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        chunk_rows = even_chunks(hidden.shape[0], chunk_rows)
        grad_hidden = hidden.new_empty(hidden.shape) if needs_hidden else None
        grad_weight: Tensor | None = None
        if needs_weight:
            alone = hidden.shape[0] <= chunk_rows
            dtype = hidden.dtype if alone else torch.promote_types(hidden.dtype, torch.float32)
            grad_weight = _empty(tuple(weight.shape), dtype, hidden.device)
        compute_weight = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        with_grad = needs_hidden or needs_weight
        buffer = logits_buffer(min(chunk_rows, hidden.shape[0]), weight.shape[0], hidden)
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = matmul(hidden[rows], compute_weight.T, out=buffer[: len(hidden[rows])])
            loss, error = _error(logits, labels[rows], shape, with_grad=with_grad)
            dead = slice(max(0, num_tokens - start), None)
            loss[dead] = 0
            total += loss.sum(dtype=torch.float64)
            if error is None:
                continue
            error[dead] = 0
            if grad_hidden is not None:
                matmul(error, compute_weight, out=grad_hidden[rows])
            if grad_weight is not None:
                # a single chunk is summed within the GEMM, several are accumulated in fp32
                matmul(error.T, hidden[rows], out=grad_weight, add=start > 0)
        if grad_weight is not None and not len(hidden):
            grad_weight.zero_()
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total.to(torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    def backward(
        ctx: Context, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        (grad,) = grads
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad
        if grad_weight is not None:
            grad_weight = _scaled(grad_weight, grad, ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns factor · x in `dtype`, in one pass over a gradient as large as the vocabulary."""
    kernels = kernels_for(x) if x.dtype == torch.float32 and dtype in DTYPE_CODES else None
    if kernels is None:
        return (x * factor).to(dtype)
    out = _empty(tuple(x.shape), dtype, x.device)
    kernels.scaled(x.data_ptr(), factor.item(), out.data_ptr(), DTYPE_CODES[dtype], x.numel())
    return out


def logits_buffer(rows: int, columns: int, like: Tensor) -> Tensor:
    """Returns an uninitialized buffer for logits.

    On a CPU its rows are padded by a cache line: with a stride that is a multiple of 2 kB, as many
    vocabularies have, rows would map to the same few cache sets.
    """
    if (
        like.device.type != "cpu" or triton_unsupported_reason(like) is None
    ):  # the latter in Triton's interpreter
        return like.new_empty(rows, columns)
    return _empty((rows, columns + 64 // like.element_size()), like.dtype, like.device)[:, :columns]


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns an uninitialized tensor; on a CPU, large ones reuse buffers of the previous step."""
    if device.type == "cpu":
        return cached_empty(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=device)
