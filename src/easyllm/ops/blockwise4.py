"""Weights in blocks of 4-bit codes, NF4 and FP4, in the layout of bitsandbytes, and their products.

Shapes: N outputs, K inputs, B = ⌈N K / 64⌉ blocks of the flat weight, T rows.

    w = codebook[code] · absmax[block]
    absmax[block] = map[absmax_code] · nested_absmax[block / 256] + nested_offset

The second line is double quantization (Dettmers et al. 2023, arXiv 2305.14314, section 3). Blocks
run over row ends; the last one may be short. A weight is dequantized into a workspace that is
reused, and multiplied like a full one; the backward pass dequantizes it again, so that only the
codes stay in memory. For a few rows, as in decoding, a C kernel dequantizes row by row in the cache
instead. Without a compiler and on other devices, PyTorch does the same.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from easyllm.ops import matmul
from easyllm.ops.autograd import Context
from easyllm.ops.deterministic import fixed_order_linear
from easyllm.ops.huge_memory import huge_empty
from easyllm.ops.kernels import kernels_for, structs
from easyllm.ops.kernels.structs import DTYPE_CODES, address

BLOCK = 64
"""Weights that share a scale."""
NESTED_BLOCK = 256
"""Scales that share a nested scale."""
FEW_ROWS = 4
"""Maximum number of rows for which the weight is not dequantized as a whole."""
PIECE = 2**20
"""Weights that PyTorch dequantizes at a time, a multiple of the block size."""
CODEBOOKS = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": tuple(sign * size / 12 for sign in (1, -1) for size in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}
"""Values of the codes. NF4's are quantiles of the normal distribution (arXiv 2305.14314, eq. 4, and
appendix E); FP4's have a sign, two exponent bits and one mantissa bit, divided by their maximum."""


@dataclass(frozen=True, slots=True)
class Blockwise4:
    """A quantized weight [N, K].

    Attributes:
        codes: [⌈N K / 2⌉] uint8, two codes per byte, the first in the high half.
        absmax: [B] fp32, or uint8 with double quantization.
        nested_absmax: [⌈B / 256⌉] fp32, or None.
        nested_offset: fp32 scalar, or None.
        codebook: `nf4` or `fp4`.
        outputs, inputs: N and K.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    codebook: str
    outputs: int
    inputs: int

    def scales(self) -> Tensor:
        """Returns the scale of each block, [B] fp32."""
        if self.nested_absmax is None or self.nested_offset is None:
            return self.absmax
        relative = dynamic_map(self.absmax.device)[self.absmax.int()]
        nested = self.nested_absmax.repeat_interleave(NESTED_BLOCK)[: len(relative)]
        return relative * nested + self.nested_offset


def packed_bytes(outputs: int, inputs: int, *, nested: bool) -> int:
    """Returns the size in bytes of a [N, K] weight, with or without double quantization."""
    blocks = -(-outputs * inputs // BLOCK)
    scales = blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 if nested else 4 * blocks
    return -(-outputs * inputs // 2) + scales


def dequantize(weight: Blockwise4, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns the weight [N, K] in `dtype`, in fresh memory; products are rounded from fp32."""
    shape = weight.outputs, weight.inputs
    if _supports(weight, dtype):
        out = torch.empty(shape, dtype=dtype)
        _unpack(weight, out)
        return out
    return reference_dequantize(weight, dtype)


def reference_dequantize(weight: Blockwise4, dtype: torch.dtype = torch.float32) -> Tensor:
    """Reference for `dequantize`, in PyTorch, on any device."""
    count = weight.outputs * weight.inputs
    scales, table = weight.scales(), codebook(weight.codebook, weight.codes.device)
    parts = []
    for first in range(0, count, PIECE):
        stop = min(first + PIECE, count)
        codes = weight.codes[first // 2 : -(-stop // 2)]
        both = torch.stack([codes >> 4, codes & 15], dim=1).view(-1)[: stop - first]
        blocks = slice(first // BLOCK, -(-stop // BLOCK))
        each = scales[blocks].repeat_interleave(BLOCK)[: stop - first]
        parts.append((table[both.int()] * each).to(dtype))
    flat = parts[0] if len(parts) == 1 else torch.cat(parts)
    return flat.view(weight.outputs, weight.inputs)


def blockwise4_linear(
    x: Tensor, weight: Blockwise4, bias: Tensor | None = None, *, deterministic: bool = False
) -> Tensor:
    """Returns x Wᵀ + b; differentiable in `x` and `bias`.

    Args:
        x: [..., K].
        weight: the quantized weight [N, K].
        bias: [N] or None.
        deterministic: whether each row is bitwise independent of the others.

    Returns:
        [..., N], dtype of `x`.
    """
    if torch.compiler.is_compiling():
        return F.linear(x, reference_dequantize(weight, x.dtype), bias)
    trained = x.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and trained:
        y: Tensor = _Differentiable.apply(x, weight, bias, deterministic)
        return y
    return _product(x, weight, bias, deterministic)


@cache
def codebook(name: str, device: torch.device) -> Tensor:
    """Returns the 16 values of a codebook, fp32; shared, so it must not be changed."""
    with torch.inference_mode(False):
        return torch.tensor(CODEBOOKS[name], device=device)


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """Returns the 256 values, ascending, of the 8-bit dynamic data type that stores scales.

    A code has a sign, an exponent of 1 to 7 bits in unary, and the other bits as a linear fraction
    (Dettmers 2015, arXiv 1511.04561, section 2.1). Shared, so it must not be changed.
    """
    values = [0.0, 1.0]
    with torch.inference_mode(False):
        for exponent in range(7):
            bounds = torch.linspace(0.1, 1, 2**exponent + 1, device="cpu")
            sizes = 10 ** (exponent - 6) * ((bounds[:-1] + bounds[1:]) / 2)
            values += [*sizes.tolist(), *(-sizes).tolist()]
        return torch.tensor(sorted(values), device=device)


def _product(x: Tensor, weight: Blockwise4, bias: Tensor | None, deterministic: bool) -> Tensor:
    rows = x.numel() // max(1, weight.inputs)
    casts = torch.is_autocast_enabled(x.device.type)
    if rows <= FEW_ROWS and not deterministic and not casts and _supports(weight, x.dtype):
        return _few_rows(x, weight, bias, rows)
    with _dequantized(weight, x.dtype) as full:
        return (fixed_order_linear if deterministic else matmul.linear)(x, full, bias)


def _few_rows(x: Tensor, weight: Blockwise4, bias: Tensor | None, rows: int) -> Tensor:
    kernels = kernels_for(x)
    assert kernels is not None, "checked by _supports()"
    x = x.contiguous()
    y = torch.empty((*x.shape[:-1], weight.outputs), dtype=x.dtype)
    wide = None if bias is None else bias.float()
    code = DTYPE_CODES[x.dtype]
    kernels.blockwise4_linear(_struct(weight), address(x), address(y), address(wide), code, rows)
    return y


class _Differentiable(torch.autograd.Function):
    """Saves only the quantized weight, which the backward pass dequantizes again."""

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, weight: Blockwise4, bias: Tensor | None, deterministic: bool
    ) -> Tensor:
        ctx.weight = weight
        return _product(x, weight, bias, deterministic)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        (grad,) = grads
        of_x, _, of_bias, _ = ctx.needs_input_grad
        to_x = None
        if of_x and torch.is_grad_enabled():  # double backward needs PyTorch's products
            to_x = grad @ dequantize(ctx.weight, grad.dtype)
        elif of_x:
            with _dequantized(ctx.weight, grad.dtype) as full:
                rows = matmul.matmul(grad.reshape(-1, grad.shape[-1]), full)
            to_x = rows.view(*grad.shape[:-1], -1)
        return to_x, None, grad.flatten(0, -2).sum(0) if of_bias else None, None


def _supports(weight: Blockwise4, dtype: torch.dtype) -> bool:
    """Whether the C kernels dequantize the weight to `dtype`."""
    on_cpu = weight.codes.device.type == "cpu"
    return on_cpu and dtype in DTYPE_CODES and kernels_for() is not None


def _unpack(weight: Blockwise4, out: Tensor) -> None:
    kernels = kernels_for(out)
    assert kernels is not None, "checked by _supports()"
    code = DTYPE_CODES[out.dtype]
    kernels.blockwise4_rows(_struct(weight), 0, weight.outputs, address(out), code)


def _struct(weight: Blockwise4) -> structs.Blockwise4:
    """Returns the weight as the kernels expect it; the weight must outlive the struct."""
    device, nested = weight.codes.device, weight.nested_absmax is not None
    return structs.Blockwise4(
        codes=address(weight.codes),
        absmax=address(weight.absmax),
        nested_map=address(dynamic_map(device)) if nested else None,
        nested_absmax=address(weight.nested_absmax),
        nested_offset=address(weight.nested_offset),
        codebook=address(codebook(weight.codebook, device)),
        outputs=weight.outputs,
        inputs=weight.inputs,
    )


class _Workspace(threading.local):
    """A thread's memory for a dequantized weight: fresh memory costs more than the kernel."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        num_bytes = shape[0] * shape[1] * dtype.itemsize
        if len(self.memory) < num_bytes:
            with torch.inference_mode(False):
                self.memory = huge_empty((num_bytes,), torch.uint8)
        return self.memory[:num_bytes].view(dtype).view(shape)


_workspace = _Workspace()


@contextmanager
def _dequantized(weight: Blockwise4, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yields the weight [N, K] in `dtype`; its memory is reused after the block."""
    if not _supports(weight, dtype):
        yield dequantize(weight, dtype)
        return
    full = _workspace.take((weight.outputs, weight.inputs), dtype)
    _unpack(weight, full)
    yield full
