"""Quantization to NF4 and FP4, with the codes and constants of bitsandbytes' build for CPUs.

A block of 64 weights is divided by its absmax, and each quotient replaced by the code of the
nearest value in the codebook; ties go to the smaller value. With double quantization, the absmax
values less their mean are quantized too: to 8 bits, in blocks of 256 (Dettmers et al. 2023,
arXiv 2305.14314, section 3). A weight then takes 4.127 bits instead of 4.5.

Equal bits need three details of bitsandbytes 0.50: a complete block is multiplied by 1 / absmax and
a short last one divided by it; scales of zero are stored as 0, of a short last block as 1e-38; the
8-bit codes come from a table of 65536 quotients, not from the quotient itself.
"""

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from easyllm.nn.blockwise4 import Blockwise4Weight
from easyllm.ops.blockwise4 import (
    BLOCK,
    NESTED_BLOCK,
    Blockwise4,
    codebook,
    dynamic_map,
    packed_bytes,
)
from easyllm.quant.registry import StorageFormat, register_storage

SMALLEST = 1e-38
"""Lower bound of a divisor."""
PIECE = 2**20
"""Weights quantized at once, a multiple of the block size."""
TABLE = 2**16
"""Quotients in -1 .. 1 whose 8-bit codes are tabulated."""


def quantize_blockwise4(weight: Tensor, codebook: str, *, nested: bool) -> Blockwise4:
    """Quantizes a finite `weight: [N, K]`.

    The mean of the scales is PyTorch's, whose last bits depend on the number of threads if there
    are more than 32,768 scales (2 million weights), as they do in bitsandbytes.

    Args:
        weight: [N, K], floating point.
        codebook: `nf4` or `fp4`.
        nested: whether to use double quantization.
    """
    outputs, inputs = weight.shape
    parts = [_quantize(part.float(), codebook) for part in weight.reshape(-1).split(PIECE)]
    codes = torch.cat([part for part, _ in parts])
    scales = torch.cat([part for _, part in parts])
    return with_scales(codes, scales, codebook, nested=nested, shape=(outputs, inputs))


def with_scales(
    codes: Tensor, scales: Tensor, codebook: str, *, nested: bool, shape: tuple[int, int]
) -> Blockwise4:
    """Returns a weight of packed codes [⌈N K / 2⌉] and scales [B], which are stored as in a file.

    Args:
        codes: two in a byte.
        scales: fp32.
        codebook: `nf4` or `fp4`.
        nested: whether the scales are quantized too.
        shape: (N, K).
    """
    if not nested:
        return Blockwise4(codes, scales, None, None, codebook, *shape)
    offset = scales.mean()
    absmax, nested_absmax = _quantize_scales(scales - offset)
    return Blockwise4(codes, absmax, nested_absmax, offset, codebook, *shape)


def _quantize(flat: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Quantizes `flat: [n]` fp32 to packed codes [⌈n / 2⌉] and scales [⌈n / 64⌉]."""
    full = len(flat) // BLOCK * BLOCK
    blocks, rest = flat[:full].view(-1, BLOCK), flat[full:]
    scales = blocks.abs().amax(1)
    quotients = (blocks * (1 / scales.clamp(min=SMALLEST))[:, None]).clamp_(-1, 1).view(-1)
    if len(rest):
        last = rest.abs().amax().clamp(min=SMALLEST)
        scales = torch.cat([scales, last[None]])
        quotients = torch.cat([quotients, (rest / last).clamp_(-1, 1)])
    if len(flat) % 2:
        quotients = F.pad(quotients, (0, 1))
    bounds, order = rounding(name, flat.device)
    codes = order[torch.bucketize(quotients, bounds, out_int32=True)]
    return (codes[::2] << 4) | codes[1::2], scales


@cache
def rounding(name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the midpoints [15] between sorted codebook values, and the codes [16] in that order.

    FP4 has two zeros: code 8 stands for positive quotients that round to zero, code 0 for others.
    """
    values = codebook(name, device)
    with torch.inference_mode(False):
        order = values.argsort(stable=True)
        ordered = values[order]
        return (ordered[:-1] + ordered[1:]) / 2, order.to(torch.uint8)


def _quantize_scales(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes scales less their mean, [B] fp32, to 8-bit codes [B] and scales [⌈B / 256⌉]."""
    blocks = F.pad(centred, (0, -len(centred) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested = blocks.abs().amax(1)
    quotients = (blocks * (1 / nested)[:, None]).clamp_(-1, 1)
    # the last product and sum are one FMA; in fp64 both are exact and the result is rounded once
    places = ((quotients + 1) * 0.5).double().mul_(TABLE - 1).add_(0.5).float()
    codes = _table(centred.device)[places.nan_to_num_().long()]
    codes[nested == 0] = 0
    return codes.view(-1)[: len(centred)], nested


@cache
def _table(device: torch.device) -> Tensor:
    """Returns the codes of `TABLE` evenly spaced quotients in -1 .. 1, uint8."""
    values = dynamic_map(device)
    with torch.inference_mode(False):
        quotients = -1 + 2 * torch.arange(TABLE, device=device).float() / (TABLE - 1)
        bounds = 0.5 * (values[:-1] + values[1:])
        return torch.bucketize(quotients, bounds).to(torch.uint8)


def _from_buffers(
    buffers: Mapping[str, Tensor], shape: tuple[int, int], codebook: str, name: str
) -> Blockwise4Weight:
    nested = buffers.get("nested_absmax"), buffers.get("nested_offset")
    matrix = Blockwise4(buffers["codes"], buffers["absmax"], *nested, codebook, *shape)
    return Blockwise4Weight(matrix, buffers["like"].dtype, name)


def _register(name: str, codebook: str, *, nested: bool) -> None:
    register_storage(
        StorageFormat(
            name=name,
            num_bytes=lambda shape: packed_bytes(*shape, nested=nested),
            quantize=lambda weight, _: Blockwise4Weight(
                quantize_blockwise4(weight, codebook, nested=nested), weight.dtype, name
            ),
            from_buffers=lambda buffers, shape: _from_buffers(buffers, shape, codebook, name),
            layout="bitsandbytes",
        )
    )


for _codebook in ("nf4", "fp4"):
    _register(_codebook, _codebook, nested=True)
    _register(f"{_codebook}-single", _codebook, nested=False)

__all__ = ["quantize_blockwise4", "rounding", "with_scales"]
