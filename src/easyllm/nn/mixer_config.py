"""Configuration of the token mixers: softmax, latent and linear attention."""

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from easyllm.core.config import Config
from easyllm.nn.norm_config import RMSNormConfig
from easyllm.nn.position_config import (
    BlockRope,
    FactorScaling,
    LongRopeScaling,
    NoPosition,
    Position,
    ReRope,
    Rope,
    RopeScaling,
    StreamingRope,
    YarnScaling,
)

HeadDirection = Literal["forward", "backward", "both"]


class AttentionConfig(Config):
    """Softmax attention: MHA if `num_kv_heads` = `num_heads`, MQA if it is 1, else GQA."""

    kind: Literal["attention"] = "attention"
    num_heads: PositiveInt = Field(description="Number of query heads.")
    num_kv_heads: PositiveInt = Field(
        description="Number of key and value heads; must divide num_heads."
    )
    head_dim: PositiveInt = Field(description="Width of a head.")
    position: Position = Field(default=Rope(), description="Position encoding of queries and keys.")
    qkv_bias: bool = Field(
        default=False,
        description="Whether the projections to queries, keys and values have a bias.",
    )
    out_bias: bool = Field(default=False, description="Whether the output projection has a bias.")
    qk_norm: RMSNormConfig | None = Field(
        default=None, description="Norm of each head's query and key (Qwen3); null for none."
    )
    scale: PositiveFloat | None = Field(
        default=None,
        description="Factor on the dot products of queries and keys; null is 1/√head_dim.",
    )
    causal: bool = Field(
        default=True, description="Whether a token sees only itself and earlier tokens."
    )
    directions: tuple[HeadDirection, ...] | None = Field(
        default=None,
        description="The direction of each query head where attention is bidirectional (causal "
        "false, or the prompt of a prefix language model): `forward` sees tokens up to itself, "
        "`backward` itself and later ones, `both` all; null is `both` for all heads.",
    )
    window: PositiveInt | None = Field(
        default=None,
        description="A query at position i sees keys at positions > i - window; null sees all.",
    )
    num_sinks: NonNegativeInt = Field(
        default=0,
        description="Number of first keys that are visible regardless of the window "
        "(StreamingLLM).",
    )
    softcap: PositiveFloat | None = Field(
        default=None,
        description="Scores become cap · tanh(score / cap) (Gemma 2); null leaves them unchanged.",
    )
    logn_length: Annotated[int, Field(gt=1)] | None = Field(
        default=None,
        description="Queries are scaled by max(1, log n / log length), where n is the number of "
        "visible tokens; null leaves them unscaled.",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> "AttentionConfig":
        if self.num_heads % self.num_kv_heads:
            fits = [str(n) for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            raise ValueError(
                f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}; "
                f"set num_kv_heads to {', '.join(fits[:-1])} or {fits[-1]}"
            )
        check_rotary(self.position, self.head_dim)
        if self.num_sinks and self.window is None:
            raise ValueError(
                f"num_sinks={self.num_sinks} needs a window; set window or remove num_sinks"
            )
        if not self.causal and self.window is not None and self.num_sinks:
            raise ValueError(
                "num_sinks needs causal attention; set causal to true or num_sinks to 0"
            )
        if not self.causal and isinstance(self.position, ReRope):
            raise ValueError("ReRoPE is defined for causal attention only; set causal to true")
        if isinstance(self.position, StreamingRope) and not (self.causal and self.window):
            raise ValueError(
                "streaming_rope uses positions inside a window; set window, and set causal to true"
            )
        self._check_directions()
        return self

    def _check_directions(self) -> None:
        if self.directions is None:
            return
        if len(self.directions) != self.num_heads:
            raise ValueError(
                f"directions has {len(self.directions)} values for num_heads={self.num_heads}; "
                "give one per query head"
            )
        forward_only = {
            "num_sinks": self.num_sinks > 0,
            "logn_length": self.logn_length is not None,
            self.position.kind: isinstance(self.position, ReRope | StreamingRope),
        }
        for name, present in forward_only.items():
            if present:
                raise ValueError(
                    f"{name} counts earlier tokens, which heads of direction backward do not see; "
                    f"remove directions or {name}"
                )


class LinearAttentionConfig(Config):
    """Linear attention, without a softmax over pairs and with a constant-size state in decoding.

    See `ops/linear_attention`.
    """

    kind: Literal["linear_attention"] = "linear_attention"
    num_heads: PositiveInt = Field(description="Number of heads.")
    head_dim: PositiveInt = Field(description="Width of a head.")
    features: Literal["elu", "softmax", "cosine"] = Field(
        default="elu",
        description="Feature map: `elu` is elu + 1 (arXiv 2006.16236), `softmax` is two separate "
        "softmaxes (arXiv 1812.01243), `cosine` is 1 + cos(q, k).",
    )
    position: Annotated[Rope | NoPosition, Field(discriminator="kind")] = Field(
        default=NoPosition(),
        description="Position encoding of queries and keys; RoPE needs features elu.",
    )
    qkv_bias: bool = Field(
        default=False,
        description="Whether the projections to queries, keys and values have a bias.",
    )
    out_bias: bool = Field(default=False, description="Whether the output projection has a bias.")
    causal: bool = Field(
        default=True, description="Whether a token sees only itself and earlier tokens."
    )

    @model_validator(mode="after")
    def _fits_together(self) -> "LinearAttentionConfig":
        check_rotary(self.position, self.head_dim)
        if isinstance(self.position, Rope) and self.features != "elu":
            raise ValueError(
                f"RoPE in linear attention needs features elu, got {self.features}; "
                "with other features, rotation would make weights in the normaliser negative"
            )
        return self


class LatentAttentionConfig(Config):
    """Multi-head latent attention, MLA (DeepSeek-V2: arXiv 2405.04434, section 2.1).

    Keys and values are projected up from one latent vector per token. The cache stores that vector
    and a rotated key that all heads share: kv_rank + rope_dim numbers for each token.
    """

    kind: Literal["latent_attention"] = "latent_attention"
    num_heads: PositiveInt = Field(description="Number of heads.")
    q_rank: PositiveInt | None = Field(
        default=None,
        description="Width of the latent vector of queries; null projects queries directly.",
    )
    kv_rank: PositiveInt = Field(description="Width of the latent vector of keys and values.")
    nope_dim: PositiveInt = Field(
        description="Width of the part of a head's query and key that has no position."
    )
    rope_dim: PositiveInt = Field(description="Width of the rotated part of a query and key.")
    value_dim: PositiveInt = Field(description="Width of a head's value.")
    position: Rope = Field(default=Rope(interleaved=True), description="RoPE of the rotated part.")
    norm: RMSNormConfig = Field(
        default=RMSNormConfig(eps=1e-6), description="Norm of the latent vectors."
    )
    bias: bool = Field(
        default=False,
        description="Whether the projections to latent vectors and the output have a bias.",
    )
    mscale: NonNegativeFloat = Field(
        default=0.0,
        description="m in the factor (0.1 m ln(factor) + 1)² on the scores with YaRN scaling "
        "(`mscale_all_dim` of DeepSeek); 0 for none.",
    )
    causal: bool = Field(
        default=True, description="Whether a token sees only itself and earlier tokens."
    )

    @property
    def query_dim(self) -> int:
        """Width of a head's query and key."""
        return self.nope_dim + self.rope_dim

    @property
    def cache_dim(self) -> int:
        """Number of cached elements per token."""
        return self.kv_rank + self.rope_dim

    @model_validator(mode="after")
    def _fits_together(self) -> "LatentAttentionConfig":
        check_rotary(self.position, self.rope_dim)
        if self.mscale and not isinstance(self.position.scaling, YarnScaling):
            raise ValueError(f"mscale={self.mscale} needs YaRN scaling; set mscale to 0")
        return self


def check_rotary(position: Config, head_dim: int) -> None:
    """Checks that a rotary position embedding matches the width of a head.

    Raises:
        ValueError: the rotated width or the number of factors does not match `head_dim`.
    """
    if isinstance(position, Rope):
        width = position.rotary_dim or head_dim
        if width > head_dim or width % 2:
            raise ValueError(f"rotary_dim={width} must be even and at most head_dim={head_dim}")
        scaling = position.scaling
        for factors in _rope_factors(scaling):
            if len(factors) != width // 2:
                raise ValueError(
                    f"got {len(factors)} RoPE factors for {width // 2} pairs of dims; "
                    "give one factor per pair"
                )
    if isinstance(position, BlockRope) and head_dim % 4:
        raise ValueError(f"head_dim={head_dim} must be divisible by 4 for block_rope")
    if isinstance(position, ReRope | StreamingRope) and head_dim % 2:
        raise ValueError(f"head_dim={head_dim} must be even for {position.kind}")


def _rope_factors(scaling: RopeScaling | None) -> tuple[tuple[float, ...], ...]:
    """Returns the lists of factors of a scaling that has one for each pair."""
    if isinstance(scaling, FactorScaling):
        return (scaling.factors,)
    if isinstance(scaling, LongRopeScaling):
        return (scaling.short_factors, scaling.long_factors)
    return ()


Mixer = Annotated[
    AttentionConfig | LatentAttentionConfig | LinearAttentionConfig, Field(discriminator="kind")
]


__all__ = [
    "AttentionConfig",
    "HeadDirection",
    "LatentAttentionConfig",
    "LinearAttentionConfig",
    "Mixer",
    "check_rotary",
]
