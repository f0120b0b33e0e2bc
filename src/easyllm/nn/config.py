"""Configuration of the decoder. Each option is a field of its variant; `kind` selects the variant.

Invalid combinations are rejected here, when a configuration is created, never in a `forward`.
"""

from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from easyllm.core.config import Config
from easyllm.nn.feed_forward_config import FeedForward, GLUConfig, MLPConfig, MoEConfig
from easyllm.nn.mixer_config import (
    AttentionConfig,
    LatentAttentionConfig,
    LinearAttentionConfig,
    Mixer,
    check_rotary,
)
from easyllm.nn.norm_config import LayerNormConfig, Norm, PartialRMSNormConfig, RMSNormConfig
from easyllm.nn.position_config import (
    BY_LENGTH,
    EmbeddingPosition,
    NoPosition,
    Sinusoidal,
)

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
        if any(_has_directions(layer.mixer) for layer in self.layers):
            raise ValueError(
                "the decoder of an encoder–decoder is causal, so directions has no effect there; "
                "set it in the encoder's layers"
            )

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
        elif not self.has_prefix and any(
            layer.mixer.causal and _has_directions(layer.mixer) for layer in self.layers
        ):
            raise ValueError(
                "directions has no effect on causal attention without a prefix; set prompt_mask "
                "to prefix, or causal to false"
            )
        if self.normalise_head and self.tie_embeddings:
            raise ValueError(
                "normalise_head scales the rows of a separate output head; set tie_embeddings to "
                "false"
            )
        return self


def _has_directions(mixer: Mixer) -> bool:
    return isinstance(mixer, AttentionConfig) and mixer.directions is not None


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
