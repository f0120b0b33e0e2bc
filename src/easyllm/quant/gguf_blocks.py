"""Quantization to GGUF's blocks (Q8_0 … Q4_0, Q6_K … Q4_K) with the smallest weighted error.

The layouts are GGML's (gguf 0.19, `quants`, dequantizes all of them). How a block's scale is chosen
is free; here several are tried, the codes follow by rounding, and the scale (and minimum) that
minimise Σ u (w − w')² for these codes are computed in closed form. u is the mean square of each
input on calibration text (an importance matrix), or w² where there is none.

    Q8_0, Q5_0, Q4_0   32 weights, w' = d q                     signed codes
    Q5_1, Q4_1         32 weights, w' = d q + m
    Q6_K               256 weights: 16 parts of 16, w' = d s q        s: 8 bits, signed
    Q5_K, Q4_K         256 weights: 8 parts of 32, w' = d s q − e m   s, m: 6 bits
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK, SUPER = 32, 256
PIECE = 4096
"""Blocks quantized at once."""
SYMMETRIC_SHIFTS = tuple(0.1 * i for i in range(-9, 10))
"""What is added to the code of the largest weight in the search for a scale."""
RANGE_SHARES = tuple(1 - 0.02 * i for i in range(-2, 16))
"""Shares of the range tried in the search for a scale and a minimum."""


@dataclass(frozen=True, slots=True)
class BlockType:
    """A GGUF type.

    Attributes:
        name: its name in lower case: `q4_k`.
        block: weights a block.
        num_bytes: bytes a block.
        quantize: (weights [B, block] fp32, u [B, block] fp32) → bytes [B, num_bytes] uint8.
    """

    name: str
    block: int
    num_bytes: int
    quantize: Callable[[Tensor, Tensor], Tensor]

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, scales counted."""
        return 8 * self.num_bytes / self.block


@torch.no_grad()
def quantize_blocks(weight: Tensor, type: BlockType, importance: Tensor | None = None) -> Tensor:
    """Quantizes `weight: [N, K]` to bytes [N, K / block · num_bytes] uint8.

    Args:
        weight: [N, K], finite; K is a multiple of `type.block`.
        type: the type.
        importance: [K], the mean square of each input; None weighs large weights more.
    """
    flat = weight.float().reshape(-1, type.block)
    if importance is None:
        each = None
    else:
        # as for activations of unit variance where an input was never seen
        shown = importance.float() + 1e-6 * importance.float().mean().clamp(min=1e-30)
        each = shown.view(-1, type.block)
    parts = []
    for first in range(0, len(flat), PIECE):
        part = flat[first : first + PIECE]
        if each is None:
            u = part.square() + part.square().mean(1, keepdim=True) + 1e-30
        else:
            index = torch.arange(first, first + len(part), device=flat.device) % len(each)
            spread = (part.square().mean(1, keepdim=True) + part.square()).sqrt()
            u = each[index] * spread + 1e-30
        parts.append(type.quantize(part, u))
    return torch.cat(parts).view(len(weight), -1)


# ---- the search for scales


def best_scale(w: Tensor, u: Tensor, least: int, most: int) -> Tensor:
    """Returns the scales d [...] with the smallest Σ u (w − d q)².

    q is round(w / d) in `least` .. `most`. d has the sign that gives the weight of largest
    magnitude the code `least`, which reaches further than `most`.

    Args:
        w, u: [..., n] fp32.
        least, most: the smallest and the largest code.
    """
    place = w.abs().argmax(-1, keepdim=True)
    largest = w.gather(-1, place).squeeze(-1)
    best = torch.zeros_like(largest)
    gained = torch.full_like(largest, -1.0)
    for shift in SYMMETRIC_SHIFTS:
        inverse = (least + shift) / largest
        inverse = torch.where(largest == 0, torch.zeros_like(inverse), inverse)
        codes = (w * inverse[..., None]).round_().clamp_(least, most)
        along, square = (u * w * codes).sum(-1), (u * codes.square()).sum(-1)
        gain = along.square() / square.clamp(min=1e-38)
        better = (gain > gained) & (square > 0)
        gained = torch.where(better, gain, gained)
        best = torch.where(better, along / square.clamp(min=1e-38), best)
    return best


def best_range(w: Tensor, u: Tensor, levels: int, *, below_zero: bool) -> tuple[Tensor, Tensor]:
    """Returns d ≥ 0 and m [...] with the smallest Σ u (w − (d q + m))², q in 0 .. levels.

    Args:
        w, u: [..., n] fp32.
        levels: the largest code.
        below_zero: whether m must not be positive (K-quants store −m without a sign).
    """
    low, high = w.aminmax(dim=-1)
    if below_zero:
        low, high = low.clamp(max=0), high.clamp(min=0)
    best_d, best_m = (high - low) / levels, low
    smallest = _range_error(w, u, best_d, best_m, levels)
    total = u.sum(-1)
    for share in RANGE_SHARES:
        d = (high - low) * share / levels
        codes = _codes(w, d, low, levels)
        mean_q, mean_w = (u * codes).sum(-1) / total, (u * w).sum(-1) / total
        centred = codes - mean_q[..., None]
        variance = (u * centred.square()).sum(-1)
        slope = (u * centred * w).sum(-1) / variance.clamp(min=1e-38)
        d = torch.where(variance > 0, slope, d).clamp(min=0)
        m = mean_w - d * mean_q
        if below_zero:
            above = m > 0
            through_zero = (u * codes * w).sum(-1) / (u * codes.square()).sum(-1).clamp(min=1e-38)
            d, m = torch.where(above, through_zero.clamp(min=0), d), m.clamp(max=0)
        error = _range_error(w, u, d, m, levels)
        better = error < smallest
        smallest = torch.where(better, error, smallest)
        best_d, best_m = torch.where(better, d, best_d), torch.where(better, m, best_m)
    return best_d, best_m


def _codes(w: Tensor, d: Tensor, m: Tensor, levels: int) -> Tensor:
    """Returns round((w − m) / d) in 0 .. levels; 0 where d is 0."""
    inverse = torch.where(d > 0, 1 / d.clamp(min=1e-38), torch.zeros_like(d))
    return ((w - m[..., None]) * inverse[..., None]).round_().clamp_(0, levels)


def _range_error(w: Tensor, u: Tensor, d: Tensor, m: Tensor, levels: int) -> Tensor:
    codes = _codes(w, d, m, levels)
    return (u * (w - codes * d[..., None] - m[..., None]).square()).sum(-1)


# ---- blocks of 32


def _half(values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns [B] fp32 rounded to fp16, and their bytes [B, 2]."""
    halves = values.clamp(-65504, 65504).to(torch.float16)
    return halves.float(), halves[:, None].view(torch.uint8)


def _signed_codes(w: Tensor, d: Tensor, least: int, most: int) -> Tensor:
    inverse = torch.where(d == 0, torch.zeros_like(d), 1 / d)
    return (w * inverse[..., None]).round_().clamp_(least, most)


def _nibbles(codes: Tensor) -> Tensor:
    """Packs codes [B, 2n] to bytes [B, n]: the first half in the low nibbles."""
    low, high = codes.to(torch.uint8).chunk(2, dim=1)
    return (low & 15) | ((high & 15) << 4)


def _fifth_bits(codes: Tensor) -> Tensor:
    """Returns bit 4 of 32 codes as 4 bytes, the first code in the lowest bit."""
    bits = (codes.to(torch.uint8) >> 4).view(-1, 4, 8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=codes.device)
    return (bits * weights).sum(-1).to(torch.uint8)


def _q8_0(w: Tensor, u: Tensor) -> Tensor:  # noqa: ARG001 - 8 bits need no search
    d, stored = _half(w.abs().amax(1) / 127)
    codes = _signed_codes(w, d, -127, 127)
    return torch.cat([stored, codes.to(torch.int8).view(torch.uint8)], 1)


def _q4_0(w: Tensor, u: Tensor) -> Tensor:
    d, stored = _half(best_scale(w, u, -8, 7))
    return torch.cat([stored, _nibbles(_signed_codes(w, d, -8, 7) + 8)], 1)


def _q5_0(w: Tensor, u: Tensor) -> Tensor:
    d, stored = _half(best_scale(w, u, -16, 15))
    codes = _signed_codes(w, d, -16, 15) + 16
    return torch.cat([stored, _fifth_bits(codes), _nibbles(codes)], 1)


def _q4_1(w: Tensor, u: Tensor) -> Tensor:
    (d, stored), (m, shift) = map(_half, best_range(w, u, 15, below_zero=False))
    return torch.cat([stored, shift, _nibbles(_codes(w, d, m, 15))], 1)


def _q5_1(w: Tensor, u: Tensor) -> Tensor:
    (d, stored), (m, shift) = map(_half, best_range(w, u, 31, below_zero=False))
    codes = _codes(w, d, m, 31)
    return torch.cat([stored, shift, _fifth_bits(codes), _nibbles(codes)], 1)


# ---- super-blocks of 256


def _k_ranges(w: Tensor, u: Tensor, levels: int) -> tuple[Tensor, ...]:
    """Quantizes scales and minima of 8 parts to 6 bits.

    Returns:
        (bytes of d and e [B, 4], scale codes [B, 8], minimum codes [B, 8], codes [B, 8, 32]).
    """
    parts, each = w.view(-1, 8, 32), u.view(-1, 8, 32)
    scales, minima = best_range(parts, each, levels, below_zero=True)
    d, stored_d = _half(scales.amax(1) / 63)
    e, stored_e = _half((-minima).amax(1) / 63)
    scale_codes = _codes(scales, d, torch.zeros_like(d), 63)
    minimum_codes = _codes(-minima, e, torch.zeros_like(e), 63)
    true_scales, true_minima = d[:, None] * scale_codes, -e[:, None] * minimum_codes
    codes = _codes(parts, true_scales, true_minima, levels)
    return torch.cat([stored_d, stored_e], 1), scale_codes, minimum_codes, codes


def _six_bits(scales: Tensor, minima: Tensor) -> Tensor:
    """Packs 8 scales and 8 minima of 6 bits to 12 bytes, in GGML's order."""
    s, m = scales.to(torch.uint8), minima.to(torch.uint8)
    first = (s[:, :4] & 63) | ((s[:, 4:] >> 4) << 6)
    second = (m[:, :4] & 63) | ((m[:, 4:] >> 4) << 6)
    third = (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)
    return torch.cat([first, second, third], 1)


def _k_nibbles(codes: Tensor) -> Tensor:
    """Packs the low nibbles of [B, 8, 32]: parts 2i and 2i + 1 share 32 bytes."""
    pairs = codes.to(torch.uint8).view(-1, 4, 2, 32)
    return ((pairs[:, :, 0] & 15) | ((pairs[:, :, 1] & 15) << 4)).flatten(1)


def _q4_k(w: Tensor, u: Tensor) -> Tensor:
    stored, scales, minima, codes = _k_ranges(w, u, 15)
    return torch.cat([stored, _six_bits(scales, minima), _k_nibbles(codes)], 1)


def _q5_k(w: Tensor, u: Tensor) -> Tensor:
    stored, scales, minima, codes = _k_ranges(w, u, 31)
    # bit p of byte j is bit 4 of weight j of part p
    high = (codes.to(torch.uint8) >> 4) << torch.arange(8, device=w.device, dtype=torch.uint8)[
        None, :, None
    ]
    return torch.cat(
        [stored, _six_bits(scales, minima), high.sum(1).to(torch.uint8), _k_nibbles(codes)], 1
    )


def _q6_k(w: Tensor, u: Tensor) -> Tensor:
    parts, each = w.view(-1, 16, 16), u.view(-1, 16, 16)
    scales = best_scale(parts, each, -32, 31)
    place = scales.abs().argmax(1, keepdim=True)
    largest = scales.gather(1, place).squeeze(1)
    d, stored = _half(largest / -128)
    scale_codes = _signed_codes(scales, d, -128, 127)
    codes = _signed_codes(parts, d[:, None] * scale_codes, -32, 31).view(-1, 2, 4, 32) + 32
    codes = codes.to(torch.uint8)  # two halves of 128 weights, four quarters of 32 in each
    low = torch.cat(
        [
            (codes[:, :, 0] & 15) | ((codes[:, :, 2] & 15) << 4),
            (codes[:, :, 1] & 15) | ((codes[:, :, 3] & 15) << 4),
        ],
        2,
    )
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=w.device)[None, None, :, None]
    high = ((codes >> 4) << shifts).sum(2).to(torch.uint8)
    signed = scale_codes.to(torch.int8).view(torch.uint8)
    return torch.cat([low.flatten(1), high.flatten(1), signed, stored], 1)


TYPES = {
    type.name: type
    for type in (
        BlockType("q8_0", BLOCK, 34, _q8_0),
        BlockType("q5_0", BLOCK, 22, _q5_0),
        BlockType("q5_1", BLOCK, 24, _q5_1),
        BlockType("q4_0", BLOCK, 18, _q4_0),
        BlockType("q4_1", BLOCK, 20, _q4_1),
        BlockType("q6_k", SUPER, 210, _q6_k),
        BlockType("q5_k", SUPER, 176, _q5_k),
        BlockType("q4_k", SUPER, 144, _q4_k),
    )
}
"""The types that weights can be quantized to, by name."""

__all__ = ["TYPES", "BlockType", "quantize_blocks"]
