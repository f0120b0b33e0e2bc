"""8-bit AdamW: moments quantized to one byte, in blocks of 256 with one fp32 scale per block.

See Dettmers et al. 2021, arXiv 2110.02861.

    m = s · sign(q) (q / 127)²,  q in −127..127          v = s · (q / 255)⁴,  q in 1..255

As with the paper's dynamic data type, the powers give small values a fine resolution: the relative
spacing of codes is 2/q for m and 4/q for v. Three things differ from the paper. Codes are computed
rather than looked up. v is never quantized to 0, for which the update would be m / ε. Rounding is
dithered: with rounding to nearest, a moving average that changes by 0.1% per step never leaves a
code that is 1.6% wide, so v stays at its first value (on a quadratic whose noise drops midway, the
median of v was 0.58 of the exact value after 1000 steps; with dithering it is 1.00).

A code is therefore ⌊x + u⌋ with u = frac(φ₁ i + φ₂ t) for element i of a block at step t. Over the
steps, u is uniform in [0, 1), so the codes are unbiased on average, without any RNG state.
"""

import ctypes

import torch
from torch import Tensor
from torch.nn import functional as F

from easyllm.ops.kernels import kernels_for
from easyllm.ops.kernels.structs import DTYPE_CODES, AdamWInt8Tensors, address
from easyllm.train.optim_config import AdamWConfig
from easyllm.train.update_rules import AdamW, State, WeightUpdate

BLOCK = 256
MIN_QUANTIZED_ELEMENTS = 4096
"""Smaller tensors keep fp32 moments: little memory is saved, and norms and biases are sensitive."""
BELOW_ONE = 1 - 2**-24
"""The largest fp32 number below 1; clamps fp64 fractions that would round up to 1."""
PER_ELEMENT, PER_STEP = 0.5698402909980532, 0.7548776662466927
"""φ₁ and φ₂: 1/ρ² and 1/ρ for ρ³ = ρ + 1, whose multiples fill the unit square evenly
(Roberts 2018, sequence R2)."""


class AdamWInt8:
    """AdamW update rule with int8 moments, which are dequantized piece by piece.

    Args:
        config: AdamW's hyperparameters.
    """

    def __init__(self, config: AdamWConfig) -> None:
        self.adamw = AdamW(config)

    def new_state(self, master: Tensor) -> State:
        """Returns zero moments: int8 codes [n] and fp32 scales [⌈n/256⌉], fp32 if small."""
        if master.numel() < MIN_QUANTIZED_ELEMENTS:
            return self.adamw.new_state(master)
        count, device = master.numel(), master.device
        blocks = -(-count // BLOCK)
        return {
            "step": torch.zeros((), dtype=torch.float32, device=device),
            "exp_avg_codes": torch.zeros(count, dtype=torch.int8, device=device),
            "exp_avg_scales": torch.zeros(blocks, device=device),
            "exp_avg_sq_codes": torch.zeros(count, dtype=torch.uint8, device=device),
            "exp_avg_sq_scales": torch.zeros(blocks, device=device),
        }

    def update(self, weight: WeightUpdate, state: State) -> None:
        """Applies one AdamW step to the master weight, its copy and the moments, in place."""
        if weight.master.numel() < MIN_QUANTIZED_ELEMENTS:
            self.adamw.update(weight, state)
            return
        state["step"] += 1
        offset = dither(state["step"])
        copies = () if weight.copy is None else (weight.copy,)
        kernels = kernels_for(weight.master, weight.gradient, *copies)
        if kernels is not None:
            self._in_one_pass(kernels, weight, state, offset)
            return
        for part, master, gradient in weight.pieces():
            blocks = slice(part.start // BLOCK, -(-part.stop // BLOCK))
            m_codes, m_scales = state["exp_avg_codes"][part], state["exp_avg_scales"][blocks]
            v_codes, v_scales = state["exp_avg_sq_codes"][part], state["exp_avg_sq_scales"][blocks]
            exp_avg = dequantize_signed(m_codes, m_scales).to(master.dtype)
            exp_avg_sq = dequantize_positive(v_codes, v_scales).to(master.dtype)
            self.adamw.move(
                master, gradient, exp_avg, exp_avg_sq, step=state["step"], weight=weight
            )
            for kept, new in zip(
                (m_codes, m_scales, v_codes, v_scales),
                (
                    *quantize_signed(exp_avg.float(), offset),
                    *quantize_positive(exp_avg_sq.float(), offset),
                ),
                strict=True,
            ):
                kept.copy_(new)

    def _in_one_pass(
        self, kernels: ctypes.CDLL, weight: WeightUpdate, state: State, offset: Tensor
    ) -> None:
        """Performs the same update block by block in C, with bitwise identical results."""
        gradient = weight.gradient.contiguous()
        tensors = AdamWInt8Tensors(
            master=address(weight.master),
            mean=address(state["exp_avg_codes"]),
            square=address(state["exp_avg_sq_codes"]),
            mean_scales=address(state["exp_avg_scales"]),
            square_scales=address(state["exp_avg_sq_scales"]),
            offset=address(offset),
            gradient=address(gradient),
            copy=address(weight.copy),
            count=weight.master.numel(),
            dtype=DTYPE_CODES[gradient.dtype],
        )
        kernels.adamw_int8(tensors, self.adamw.numbers(weight, float(state["step"])))


def dither(step: Tensor) -> Tensor:
    """Returns the dither [256] in [0, 1), fp32, that is added to a block's codes before flooring.

    Args:
        step: the step, counted from 1, as a scalar tensor.
    """
    # for large steps, fp32 would have no fractional bits left
    elements = torch.arange(BLOCK, device=step.device, dtype=torch.float64)
    return (elements * PER_ELEMENT + step.double() * PER_STEP).frac_().float().clamp_(max=BELOW_ONE)


def quantize_signed(values: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes `values: [n]` fp32 to int8 codes [n] and scales [⌈n/256⌉]."""
    blocks = _blocks(values)
    sizes = blocks.abs()
    scales = sizes.amax(1)
    codes = _codes(sizes.sqrt_(), 127 / _divisor(scales).sqrt(), offset).clamp_(max=127)
    return codes.copysign_(blocks).to(torch.int8).view(-1)[: len(values)], scales


def dequantize_signed(codes: Tensor, scales: Tensor) -> Tensor:
    """Dequantizes int8 codes [n] with scales [⌈n/256⌉] to fp32 [n]."""
    whole = _blocks(codes.float())
    return whole.mul_(whole.abs()).mul_((scales * 127**-2)[:, None]).view(-1)[: len(codes)]


def quantize_positive(values: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes non-negative `values: [n]` fp32 to uint8 codes [n] and scales [⌈n/256⌉]."""
    blocks = _blocks(values)
    scales = blocks.amax(1)
    codes = _codes(blocks.sqrt().sqrt_(), 255 / _divisor(scales).sqrt().sqrt_(), offset)
    return codes.clamp_(1, 255).to(torch.uint8).view(-1)[: len(values)], scales


def dequantize_positive(codes: Tensor, scales: Tensor) -> Tensor:
    """Dequantizes uint8 codes [n] with scales [⌈n/256⌉] to fp32 [n]."""
    whole = _blocks(codes.float())
    return whole.square_().square_().mul_((scales * 255**-4)[:, None]).view(-1)[: len(codes)]


def _codes(roots: Tensor, per_root: Tensor, offset: Tensor) -> Tensor:
    """Returns ⌊roots · per_root + offset⌋, in place."""
    return roots.mul_(per_root).add_(offset).floor_()


def _blocks(values: Tensor) -> Tensor:
    """Returns the values as blocks [⌈n/256⌉, 256], the last one padded with zeros."""
    missing = -len(values) % BLOCK
    return (F.pad(values, (0, missing)) if missing else values).view(-1, BLOCK)


def _divisor(scales: Tensor) -> Tensor:
    """Returns the scales as [blocks, 1], clamped above 0 for division."""
    return scales.clamp_min(torch.finfo(scales.dtype).tiny)[:, None]
