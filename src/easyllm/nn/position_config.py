"""Configuration of position encodings: in attention, with RoPE scaling, and in the embedding."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from easyllm.core.config import Config


class LinearScaling(Config):
    """Position interpolation: positions / `factor` (Chen et al. 2023, arXiv 2306.15595)."""

    kind: Literal["linear"] = "linear"
    factor: PositiveFloat = Field(description="Divisor of the positions.")


class NTKScaling(Config):
    """NTK-aware scaling with the base θ · factor^(d/(d-2)).

    High frequencies are unchanged, low frequencies are interpolated.
    """

    kind: Literal["ntk"] = "ntk"
    factor: PositiveFloat = Field(description="Extension factor of the context length.")


class DynamicNTKScaling(Config):
    """NTK scaling with a factor that depends on the length n of each sequence.

    The factor is factor · n / original - (factor - 1) once n exceeds the original length. Cached
    keys keep the base they were rotated with (as in HF), so beyond the original length decoding
    with a KV cache differs from a single forward pass.
    """

    kind: Literal["dynamic"] = "dynamic"
    factor: PositiveFloat = Field(
        description="f in the scaling f · n / original - (f - 1); shorter sequences are unscaled."
    )
    original_max_seq_len: PositiveInt = Field(
        description="Maximum sequence length in pretraining, in tokens."
    )


class YarnScaling(Config):
    """YaRN: interpolation by parts with attention scaling (Peng et al. 2023, arXiv 2309.00071).

    See sections 3.2 and 3.3.
    """

    kind: Literal["yarn"] = "yarn"
    factor: PositiveFloat = Field(description="Extension factor of the context length.")
    original_max_seq_len: PositiveInt = Field(
        description="Maximum sequence length in pretraining, in tokens."
    )
    beta_fast: PositiveFloat = Field(
        default=32.0,
        description="Pairs that rotate more often than this over the original length are "
        "unchanged.",
    )
    beta_slow: PositiveFloat = Field(
        default=1.0,
        description="Pairs that rotate less often than this over the original length are "
        "interpolated.",
    )
    attention_factor: PositiveFloat | None = Field(
        default=None, description="Factor on cos and sin; null is 0.1 ln(factor) + 1."
    )
    truncate: bool = Field(
        default=True,
        description="Whether the bounds between the parts are rounded to integers, as in the "
        "authors' code.",
    )


class Llama3Scaling(Config):
    """The scaling of Llama 3.1 (from its released code).

    The frequencies of long wavelengths are divided by `factor` and those of short wavelengths are
    unchanged, with a linear ramp in between.
    """

    kind: Literal["llama3"] = "llama3"
    factor: PositiveFloat = Field(description="Divisor of the frequencies of long wavelengths.")
    low_freq_factor: PositiveFloat = Field(
        description="Wavelengths over original_max_seq_len / low_freq_factor are long."
    )
    high_freq_factor: PositiveFloat = Field(
        description="Wavelengths under original_max_seq_len / high_freq_factor are short."
    )
    original_max_seq_len: PositiveInt = Field(
        description="Maximum sequence length in pretraining, in tokens."
    )


class FactorScaling(Config):
    """Divides the frequency of each pair by its own factor (tensor `rope_freqs.weight` in GGUF)."""

    kind: Literal["factors"] = "factors"
    factors: tuple[PositiveFloat, ...] = Field(description="Divisor of the frequency of each pair.")


class LongRopeScaling(Config):
    """LongRoPE: one factor for each pair, others for long sequences (arXiv 2402.13753).

    A sequence of more than `original_max_seq_len` tokens has the long factors. Cached keys keep the
    factors they were rotated with (as in HF), so decoding across that length differs from a single
    forward pass.
    """

    kind: Literal["longrope"] = "longrope"
    short_factors: tuple[PositiveFloat, ...] = Field(
        description="Divisor of the frequency of each pair in a sequence up to the original length."
    )
    long_factors: tuple[PositiveFloat, ...] = Field(
        description="Divisor of the frequency of each pair in a longer sequence."
    )
    factor: PositiveFloat = Field(description="Extension factor s of the context length.")
    original_max_seq_len: Annotated[int, Field(gt=1)] = Field(
        description="Maximum sequence length L in pretraining, in tokens."
    )
    attention_factor: PositiveFloat | None = Field(
        default=None,
        description="Factor on cos and sin; null is √(1 + ln s / ln L), from s = 1 on.",
    )


RopeScaling = Annotated[
    LinearScaling
    | NTKScaling
    | DynamicNTKScaling
    | YarnScaling
    | Llama3Scaling
    | FactorScaling
    | LongRopeScaling,
    Field(discriminator="kind"),
]
BY_LENGTH = (DynamicNTKScaling, LongRopeScaling)
"""Scalings that depend on the length of a sequence."""


class Rope(Config):
    """Rotary position embedding, RoPE (Su et al. 2021, arXiv 2104.09864)."""

    kind: Literal["rope"] = "rope"
    theta: PositiveFloat = Field(
        default=10000.0, description="Base θ of the frequencies θ^(-2i/d)."
    )
    interleaved: bool = Field(
        default=False,
        description="Whether pairs are (2i, 2i+1) as in the paper, instead of HF's (i, i + d/2).",
    )
    rotary_dim: PositiveInt | None = Field(
        default=None, description="Number of rotated dims of a head; null rotates all."
    )
    scaling: RopeScaling | None = Field(
        default=None, description="Scaling for longer contexts; null for none."
    )


class BlockRope(Config):
    """Two-dimensional RoPE: half of the pairs rotate by each of GLM's two positions (ChatGLM-6B).

    The positions are those in the text and in the generated block.
    """

    kind: Literal["block_rope"] = "block_rope"
    theta: PositiveFloat = Field(
        default=10000.0, description="Base θ of the frequencies θ^(-4i/d) of each position."
    )


class ReRope(Config):
    """ReRoPE: relative positions beyond `window` are clipped to `window` (Su 2023).

    With `leak` k they become window + (distance - window) / k instead. For inference with a model
    trained with RoPE; keys are stored unrotated.
    """

    kind: Literal["rerope"] = "rerope"
    theta: PositiveFloat = Field(
        default=10000.0, description="Base θ of the frequencies θ^(-2i/d)."
    )
    window: PositiveInt = Field(
        description="Relative position, in tokens, beyond which positions are clipped."
    )
    leak: PositiveFloat | None = Field(
        default=None,
        description="k in window + (distance - window) / k, the relative position beyond the "
        "window; null clips it to the window.",
    )


class StreamingRope(Config):
    """RoPE for StreamingLLM (Xiao et al. 2023, arXiv 2309.17453, section 3.2).

    Positions are those inside a KV cache of attention sinks and recent tokens, so generation can
    continue without a length limit and no distance exceeds the cache size. For inference with a
    model trained with RoPE; needs a window (usually with sinks); keys are stored unrotated.
    """

    kind: Literal["streaming_rope"] = "streaming_rope"
    theta: PositiveFloat = Field(
        default=10000.0, description="Base θ of the frequencies θ^(-2i/d)."
    )


class Alibi(Config):
    """ALiBi: a penalty linear in the distance, with a slope per head (Press et al. 2021).

    See arXiv 2108.12409.
    """

    kind: Literal["alibi"] = "alibi"


class T5Bias(Config):
    """T5's relative position bias: a learned bias per distance bucket and head.

    See Raffel et al. 2019, arXiv 1910.10683.
    """

    kind: Literal["t5_bias"] = "t5_bias"
    num_buckets: PositiveInt = Field(default=32, description="Number of distance buckets.")
    max_distance: PositiveInt = Field(
        default=128,
        description="Distance, in tokens, from which all distances share the last bucket.",
    )
    shared: bool = Field(
        default=False,
        description="Whether the layers of a stack share the table of the first one (T5).",
    )


class Shaw(Config):
    """Learned vectors for clipped distances, added to keys and values (Shaw et al. 2018).

    See arXiv 1803.02155.
    """

    kind: Literal["shaw"] = "shaw"
    max_distance: PositiveInt = Field(
        default=16, description="Distance, in tokens, to which distances are clipped."
    )
    values: bool = Field(default=True, description="Whether vectors are also added to values.")


class TransformerXL(Config):
    """Transformer-XL's four terms of content and distance (Dai et al. 2019, arXiv 1901.02860)."""

    kind: Literal["transformer_xl"] = "transformer_xl"
    base: PositiveFloat = Field(
        default=10000.0, description="Base of the frequencies of the sinusoidal distances."
    )


class DebertaRelative(Config):
    """DeBERTa's disentangled attention: content to position and back (arXiv 2006.03654)."""

    kind: Literal["deberta"] = "deberta"
    max_distance: PositiveInt = Field(
        default=512, description="Distance, in tokens, to which distances are clipped."
    )


class NoPosition(Config):
    """No position information apart from the mask."""

    kind: Literal["none"] = "none"


class Learned(Config):
    """A learned vector per position, added to the embedding; longer sequences raise an error."""

    kind: Literal["learned"] = "learned"


class BlockLearned(Config):
    """Two learned vectors, one for each of GLM's two positions, added to the embedding."""

    kind: Literal["block_learned"] = "block_learned"


class Sinusoidal(Config):
    """Sinusoidal positions: sin and cos of position / base^(2i/D), added to the embedding.

    See arXiv 1706.03762, section 3.5.
    """

    kind: Literal["sinusoidal"] = "sinusoidal"
    base: PositiveFloat = Field(
        default=10000.0, description="Base of the frequencies base^(-2i/D)."
    )


Position = Annotated[
    Rope
    | BlockRope
    | ReRope
    | StreamingRope
    | Alibi
    | T5Bias
    | Shaw
    | TransformerXL
    | DebertaRelative
    | NoPosition,
    Field(discriminator="kind"),
]
EmbeddingPosition = Annotated[
    Learned | BlockLearned | Sinusoidal | NoPosition, Field(discriminator="kind")
]
