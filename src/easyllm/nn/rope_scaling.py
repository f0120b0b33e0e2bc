"""RoPE frequencies, and scaling methods that extend the context beyond the training length."""

import math

import torch
from torch import Tensor

from easyllm.nn.position_config import (
    DynamicNTKScaling,
    FactorScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NTKScaling,
    Rope,
    YarnScaling,
)


def rope_frequencies(rope: Rope, width: int, length: int) -> tuple[Tensor, float]:
    """Returns the frequencies of the rotated pairs, and the factor on cos and sin.

    Args:
        rope: base and scaling.
        width: number of rotated dims of a head.
        length: number of tokens of the longest sequence (for dynamic NTK and LongRoPE).

    Returns:
        [width/2] fp32 radians per token; the factor, which is 1 except for YaRN and LongRoPE.
    """
    scaling = rope.scaling
    match scaling:
        case None:
            return frequencies(rope.theta, width), 1.0
        case LinearScaling():
            return frequencies(rope.theta, width) / scaling.factor, 1.0
        case NTKScaling():
            return frequencies(ntk_base(rope.theta, width, scaling.factor), width), 1.0
        case DynamicNTKScaling():
            original = scaling.original_max_seq_len
            stretched = max(length, original)
            factor = scaling.factor * stretched / original - (scaling.factor - 1)
            return frequencies(ntk_base(rope.theta, width, factor), width), 1.0
        case YarnScaling():
            return yarn_frequencies(rope.theta, width, scaling), yarn_attention_factor(scaling)
        case Llama3Scaling():
            return llama3_frequencies(rope.theta, width, scaling), 1.0
        case FactorScaling():
            return frequencies(rope.theta, width) / torch.tensor(scaling.factors), 1.0
        case LongRopeScaling():
            long = length > scaling.original_max_seq_len
            factors = torch.tensor(scaling.long_factors if long else scaling.short_factors)
            return frequencies(rope.theta, width) / factors, longrope_attention_factor(scaling)


def frequencies(theta: float, width: int) -> Tensor:
    """Returns θ^(-2i/width) for i = 0 .. width/2 - 1 (arXiv 2104.09864), [width/2] fp32."""
    exponents = torch.arange(0, width, 2, dtype=torch.int64).float() / width
    return 1.0 / theta**exponents


def ntk_base(theta: float, width: int, factor: float) -> float:
    """Returns the base θ · factor^(width/(width-2)).

    It divides the lowest frequency by `factor` and leaves the highest unchanged.

    >>> round(ntk_base(10000, 128, 2), 2)
    20221.26
    """
    return float(theta * factor ** (width / (width - 2)))


def yarn_attention_factor(scaling: YarnScaling) -> float:
    """Returns 0.1 ln(factor) + 1 (arXiv 2309.00071, eq. 22), or the configured factor.

    It scales both query and key, so scores are scaled by its square.
    """
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return yarn_mscale(scaling.factor, 1.0)


def yarn_mscale(factor: float, weight: float) -> float:
    """Returns 0.1 m ln(factor) + 1, YaRN's scale of attention with DeepSeek's weight m."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def longrope_attention_factor(scaling: LongRopeScaling) -> float:
    """Returns √(1 + ln s / ln L) (arXiv 2402.13753, section 3.3), or the configured factor."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    grown = math.log(max(scaling.factor, 1.0)) / math.log(scaling.original_max_seq_len)
    return math.sqrt(1 + grown)


def yarn_frequencies(theta: float, width: int, scaling: YarnScaling) -> Tensor:
    """Returns the frequencies of YaRN, [width/2] fp32 (arXiv 2309.00071, eqs. 17-21).

    Pairs that rotate more than `beta_fast` times over the original length are unchanged, and those
    that rotate fewer than `beta_slow` times are interpolated, with a linear ramp over the dims in
    between.
    """
    kept = frequencies(theta, width)
    low = _dim_of(scaling.beta_fast, theta, width, scaling.original_max_seq_len)
    high = _dim_of(scaling.beta_slow, theta, width, scaling.original_max_seq_len)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = (torch.arange(width // 2).float() - low) / max(high - low, 0.001)
    interpolated_share = ramp.clamp(0, 1)
    return kept / scaling.factor * interpolated_share + kept * (1 - interpolated_share)


def llama3_frequencies(theta: float, width: int, scaling: Llama3Scaling) -> Tensor:
    """Returns the frequencies of Llama 3.1, [width/2] fp32.

    Frequencies with wavelengths over original/low_freq_factor are divided by `factor`, those with
    wavelengths under original/high_freq_factor are unchanged, with a smooth transition in between.
    """
    kept = frequencies(theta, width)
    turns = scaling.original_max_seq_len * kept / (2 * math.pi)  # over the original length
    smooth = (turns - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * kept / scaling.factor + smooth * kept


def critical_dim(theta: float, width: int, length: int) -> int:
    """Returns the number of dims whose pairs make at least one full rotation over `length` tokens.

    This is 2 ⌈(width/2) log_θ(length / 2π)⌉ (arXiv 2310.05209, eq. 3).

    >>> critical_dim(10000, 128, 4096)
    92
    """
    return 2 * math.ceil(width / 2 * math.log(length / (2 * math.pi), theta))


def _dim_of(turns: float, theta: float, width: int, length: int) -> float:
    """The dim whose pair makes `turns` full rotations over `length` tokens."""
    return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))
