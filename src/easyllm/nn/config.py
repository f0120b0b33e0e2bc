"""Configuration of the decoder. Each option is a field of its variant; `kind` selects the variant.

Invalid combinations are rejected here, when a configuration is created, never in a `forward`.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from easyllm.core.config import Config
from easyllm.nn.feed_forward_config import FeedForward, GLUConfig, MLPConfig, MoEConfig
from easyllm.nn.norm_config import LayerNormConfig, Norm, PartialRMSNormConfig, RMSNormConfig
from easyllm.nn.position_config import (
    BY_LENGTH,
    BlockRope,
    EmbeddingPosition,
    FactorScaling,
    LongRopeScaling,
    NoPosition,
    Position,
    ReRope,
    Rope,
    RopeScaling,
    Sinusoidal,
    StreamingRope,
    YarnScaling,
)

# ---- mixers


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
        return self


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

# ---- layers and models

PromptMask = Literal["causal", "prefix", "prefix_before_last"]


class LayerConfig(Config):
    """One layer: a token mixer, a feed-forward, and the placement of their norms."""

    mixer: Mixer = Field(description="The token mixer.")
    feed_forward: FeedForward = Field(description="The feed-forward.")
    norm_placement: Literal["pre", "post", "sandwich"] = Field(
        default="pre",
        description="`pre` is x + f(N(x)), `post` is N(α x + f(x)), `sandwich` is x + N(f(N(x))).",
    )
    residual_scale: PositiveFloat = Field(
        default=1.0,
        description="α of `post` (DeepNorm: Wang et al. 2022, arXiv 2203.00555; in a decoder "
        "(2L)^¼ there, (2L)^½ in GLM-130B and ChatGLM-6B).",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> "LayerConfig":
        if self.residual_scale != 1 and self.norm_placement != "post":
            raise ValueError(
                f"residual_scale={self.residual_scale} needs norm_placement post, got "
                f"{self.norm_placement}; set one of them"
            )
        return self


class EncoderConfig(Config):
    """The encoder of an encoder–decoder, whose output all layers of the decoder attend to (T5)."""

    layers: tuple[LayerConfig, ...] = Field(
        min_length=1, description="The layers of the encoder; their attention is bidirectional."
    )
    start_token_id: NonNegativeInt = Field(
        default=0, description="The token after a prompt, with which the decoder starts."
    )
    hidden_scale: PositiveFloat = Field(
        default=1.0,
        description="Factor on the decoder's output in front of the head (T5 with tied embeddings: "
        "1/√D).",
    )


class ModelConfig(Config):
    """A complete decoder, or an encoder–decoder."""

    family: str = Field(
        description="Model family, which defines how the Hugging Face layout is read and written."
    )
    vocab_size: PositiveInt = Field(description="Number of token ids, V.")
    hidden_size: PositiveInt = Field(description="Width of the residual stream, D.")
    max_seq_len: PositiveInt = Field(description="Maximum sequence length, in tokens.")
    layers: tuple[LayerConfig, ...] = Field(
        min_length=1, description="The layers, from the embedding to the output head."
    )
    norm: Norm = Field(
        default=RMSNormConfig(), description="Norm of the layers and before the output head."
    )
    embedding_position: EmbeddingPosition = Field(
        default=NoPosition(),
        description="Positions that are added to the embedding, not applied in attention.",
    )
    embedding_scale: PositiveFloat = Field(
        default=1.0, description="Factor on the embedding (Gemma: √D)."
    )
    embedding_norm: bool = Field(
        default=False, description="Whether a norm follows the embedding (ChatGLM-6B, BLOOM)."
    )
    final_norm: bool = Field(
        default=True,
        description="Whether a norm precedes the output head (post-norm models have none).",
    )
    tie_embeddings: bool = Field(
        default=False, description="Whether the output head uses the embedding's matrix."
    )
    normalise_head: bool = Field(
        default=False,
        description="Whether the rows of the output head are scaled to unit length (NormHead of "
        "Baichuan 2: Yang et al. 2023, arXiv 2309.10305, section 2.6).",
    )
    logit_softcap: PositiveFloat | None = Field(
        default=None,
        description="Logits become cap · tanh(logit / cap); null leaves them unchanged.",
    )
    num_labels: PositiveInt | None = Field(
        default=None,
        description="Size of a score head (number of classes, or 1 for a reward) that replaces the "
        "output projection; null for none.",
    )
    prompt_mask: PromptMask = Field(
        default="causal",
        description="Whether prompt tokens see only earlier tokens (`causal`) or each other in "
        "both directions (`prefix`: arXiv 1905.03197), all but the last in `prefix_before_last` "
        "(GLM: arXiv 2103.10360).",
    )
    encoder: EncoderConfig | None = Field(
        default=None,
        description="Encoder that reads the prompt; `layers` are then those of the decoder, each "
        "with a second attention to the encoder's output. Null for a decoder alone.",
    )
    bos_token_id: int | None = Field(default=None, description="Id of BOS; null for none.")
    eos_token_ids: tuple[int, ...] = Field(default=(), description="Ids that end a generation.")
    pad_token_id: int | None = Field(default=None, description="Id of PAD; null for none.")

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    def changed(self, **values: Any) -> "ModelConfig":
        """Returns a validated copy of this configuration with some values replaced."""
        return ModelConfig.model_validate(self.model_dump() | values)

    @property
    def has_experts(self) -> bool:
        """Whether any layer is a mixture of experts."""
        return any(isinstance(layer.feed_forward, MoEConfig) for layer in self.layers)

    @property
    def has_prefix(self) -> bool:
        """Whether tokens of a prompt see each other in both directions."""
        return self.prompt_mask != "causal"

    @property
    def prefix_excludes(self) -> int:
        """Number of last tokens of a prompt that its other tokens do not see."""
        return int(self.prompt_mask == "prefix_before_last")

    @property
    def is_length_invariant(self) -> bool:
        """Whether a token's hidden state depends on itself and the tokens in front of it alone.

        It does not if attention is bidirectional, in a prefix language model, or if positions are
        scaled by the length of the sequence.
        """
        causal = all(layer.mixer.causal for layer in self.layers) and not self.has_prefix
        positions = (getattr(layer.mixer, "position", None) for layer in self.layers)
        scaled = (isinstance(getattr(p, "scaling", None), BY_LENGTH) for p in positions)
        return causal and not any(scaled)

    def _check_encoder(self, encoder: EncoderConfig) -> None:
        if self.prompt_mask != "prefix_before_last":
            raise ValueError(
                f"an encoder reads all of a prompt but its last token, with which the decoder "
                f"starts; set prompt_mask to prefix_before_last, got {self.prompt_mask}"
            )
        both = (*encoder.layers, *self.layers)
        if not all(map(_relative, both)) or not isinstance(self.embedding_position, NoPosition):
            raise ValueError(
                "an encoder–decoder needs pre-norm layers of attention with positions t5_bias, "
                "alibi or none in both stacks, and none at the embedding"
            )
        if any(layer.mixer.causal for layer in encoder.layers):
            raise ValueError("the encoder sees a prompt in both directions; set causal to false")

    @model_validator(mode="after")
    def _fits_together(self) -> "ModelConfig":
        if isinstance(self.embedding_position, Sinusoidal) and self.hidden_size % 2:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be even for sinusoidal positions"
            )
        mixers = {layer.mixer.kind for layer in self.layers}
        if self.has_prefix and "linear_attention" in mixers:
            raise ValueError(
                f"prompt_mask={self.prompt_mask} needs softmax attention in all layers, but some "
                "have linear attention; set prompt_mask to causal or change the mixers"
            )
        if self.encoder is not None:
            self._check_encoder(self.encoder)
        if self.normalise_head and self.tie_embeddings:
            raise ValueError(
                "normalise_head scales the rows of a separate output head; set tie_embeddings to "
                "false"
            )
        return self


def _relative(layer: LayerConfig) -> bool:
    """Whether a layer attends by distance alone, so that a text may start anywhere."""
    mixer = layer.mixer
    plain = isinstance(mixer, AttentionConfig) and layer.norm_placement == "pre"
    return plain and mixer.position.kind in ("t5_bias", "alibi", "none")


__all__ = [
    "AttentionConfig",
    "EncoderConfig",
    "FeedForward",
    "GLUConfig",
    "LatentAttentionConfig",
    "LayerConfig",
    "LayerNormConfig",
    "LinearAttentionConfig",
    "MLPConfig",
    "Mixer",
    "MoEConfig",
    "ModelConfig",
    "Norm",
    "PartialRMSNormConfig",
    "PromptMask",
    "RMSNormConfig",
    "check_rotary",
]
