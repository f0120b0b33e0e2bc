"""Configuration of position encodings: in attention, with RoPE scaling, and in the embedding."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from easyllm.core.config import Config


class LinearScaling(Config):
    """Position interpolation: positions / `factor` (Chen et al. 2023, arXiv 2306.15595)."""

    kind: Literal["linear"] = "linear"
    factor: PositiveFloat


class NTKScaling(Config):
    """NTK-aware scaling with the base θ · factor^(d/(d-2)).

    High frequencies are unchanged, low frequencies are interpolated.
    """

    kind: Literal["ntk"] = "ntk"
    factor: PositiveFloat


class DynamicNTKScaling(Config):
    """NTK scaling with a factor that depends on the length n of each sequence.

    The factor is factor · n / original - (factor - 1) once n exceeds the original length. Cached
    keys keep the base they were rotated with (as in HF), so beyond the original length decoding
    with a KV cache differs from a single forward pass.
    """

    kind: Literal["dynamic"] = "dynamic"
    factor: PositiveFloat
    original_max_seq_len: PositiveInt


class YarnScaling(Config):
    """YaRN: interpolation by parts with attention scaling (Peng et al. 2023, arXiv 2309.00071).

    See sections 3.2 and 3.3.
    """

    kind: Literal["yarn"] = "yarn"
    factor: PositiveFloat
    original_max_seq_len: PositiveInt
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    attention_factor: PositiveFloat | None = None
    """Factor on cos and sin; by default 0.1 ln(factor) + 1."""
    truncate: bool = True
    """Whether the bounds between the parts are rounded to integers, as in the authors' code."""


class Llama3Scaling(Config):
    """The scaling of Llama 3.1 (from its released code).

    The frequencies of long wavelengths are divided by `factor` and those of short wavelengths are
    unchanged, with a linear ramp in between.
    """

    kind: Literal["llama3"] = "llama3"
    factor: PositiveFloat
    low_freq_factor: PositiveFloat
    high_freq_factor: PositiveFloat
    original_max_seq_len: PositiveInt


class FactorScaling(Config):
    """Divides the frequency of each pair by its own factor (tensor `rope_freqs.weight` in GGUF)."""

    kind: Literal["factors"] = "factors"
    factors: tuple[PositiveFloat, ...]


RopeScaling = Annotated[
    LinearScaling | NTKScaling | DynamicNTKScaling | YarnScaling | Llama3Scaling | FactorScaling,
    Field(discriminator="kind"),
]


class Rope(Config):
    """Rotary position embedding, RoPE (Su et al. 2021, arXiv 2104.09864).

    `interleaved`: pairs are (2i, 2i+1) as in the paper, instead of HF's (i, i + d/2).
    `rotary_dim`: the number of rotated dims of a head (None: all).
    """

    kind: Literal["rope"] = "rope"
    theta: PositiveFloat = 10000.0
    interleaved: bool = False
    rotary_dim: PositiveInt | None = None
    scaling: RopeScaling | None = None


class ReRope(Config):
    """ReRoPE: relative positions beyond `window` are clipped to `window` (Su 2023).

    With `leak` k they become window + (distance - window) / k instead. For inference with a model
    trained with RoPE; keys are stored unrotated.
    """

    kind: Literal["rerope"] = "rerope"
    theta: PositiveFloat = 10000.0
    window: PositiveInt
    leak: PositiveFloat | None = None


class StreamingRope(Config):
    """RoPE for StreamingLLM (Xiao et al. 2023, arXiv 2309.17453, section 3.2).

    Positions are those inside a KV cache of attention sinks and recent tokens, so generation can
    continue without a length limit and no distance exceeds the cache size. For inference with a
    model trained with RoPE; needs a window (usually with sinks); keys are stored unrotated.
    """

    kind: Literal["streaming_rope"] = "streaming_rope"
    theta: PositiveFloat = 10000.0


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
    num_buckets: PositiveInt = 32
    max_distance: PositiveInt = 128


class Shaw(Config):
    """Learned vectors for clipped distances, added to keys and values (Shaw et al. 2018).

    See arXiv 1803.02155.
    """

    kind: Literal["shaw"] = "shaw"
    max_distance: PositiveInt = 16
    values: bool = True


class NoPosition(Config):
    """No position information apart from the mask."""

    kind: Literal["none"] = "none"


class Learned(Config):
    """A learned vector per position, added to the embedding; longer sequences raise an error."""

    kind: Literal["learned"] = "learned"


class Sinusoidal(Config):
    """Sinusoidal positions: sin and cos of position / base^(2i/D), added to the embedding.

    See arXiv 1706.03762, section 3.5.
    """

    kind: Literal["sinusoidal"] = "sinusoidal"
    base: PositiveFloat = 10000.0


Position = Annotated[
    Rope | ReRope | StreamingRope | Alibi | T5Bias | Shaw | NoPosition, Field(discriminator="kind")
]
EmbeddingPosition = Annotated[Learned | Sinusoidal | NoPosition, Field(discriminator="kind")]
