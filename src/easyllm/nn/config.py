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
from easyllm.nn.position_config import (
    EmbeddingPosition,
    FactorScaling,
    NoPosition,
    Position,
    ReRope,
    Rope,
    Sinusoidal,
    StreamingRope,
)

# ---- norms


class RMSNormConfig(Config):
    """RMSNorm: x / √(mean(x²) + eps) ⊙ weight (Zhang & Sennrich 2019, arXiv 1910.07467).

    `unit_offset`: the stored weight is the difference from 1 (Gemma).
    """

    kind: Literal["rms_norm"] = "rms_norm"
    eps: PositiveFloat = 1e-5
    unit_offset: bool = False


class LayerNormConfig(Config):
    """LayerNorm: (x - mean) / √(var + eps) ⊙ weight + bias (Ba et al. 2016, arXiv 1607.06450)."""

    kind: Literal["layer_norm"] = "layer_norm"
    eps: PositiveFloat = 1e-5
    bias: bool = True


Norm = Annotated[RMSNormConfig | LayerNormConfig, Field(discriminator="kind")]

# ---- mixers


class AttentionConfig(Config):
    """Softmax attention; `num_kv_heads` = `num_heads` is MHA, 1 is MQA, values in between are GQA.

    Attributes:
        qk_norm: normalises each head's query and key (Qwen3).
        scale: factor on the dot products of queries and keys; None means 1/√head_dim.
        causal: whether a token sees only itself and earlier tokens.
        window: a query at position i sees keys at positions > i - window.
        num_sinks: number of first keys that are visible regardless of the window (StreamingLLM).
        softcap: scores become cap · tanh(score / cap) (Gemma 2).
        logn_length: queries are scaled by max(1, log n / log length), where n is the number of
            visible tokens.
    """

    kind: Literal["attention"] = "attention"
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    position: Position = Rope()
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: RMSNormConfig | None = None
    scale: PositiveFloat | None = None
    causal: bool = True
    window: PositiveInt | None = None
    num_sinks: NonNegativeInt = 0
    softcap: PositiveFloat | None = None
    logn_length: Annotated[int, Field(gt=1)] | None = None

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

    See `ops/linear_attention`. `features`: `elu` is elu+1 (arXiv 2006.16236), `softmax` is two
    separate softmaxes (arXiv 1812.01243), `cosine` is 1 + cos(q, k).
    """

    kind: Literal["linear_attention"] = "linear_attention"
    num_heads: PositiveInt
    head_dim: PositiveInt
    features: Literal["elu", "softmax", "cosine"] = "elu"
    position: Annotated[Rope | NoPosition, Field(discriminator="kind")] = NoPosition()
    qkv_bias: bool = False
    out_bias: bool = False
    causal: bool = True

    @model_validator(mode="after")
    def _fits_together(self) -> "LinearAttentionConfig":
        check_rotary(self.position, self.head_dim)
        if isinstance(self.position, Rope) and self.features != "elu":
            raise ValueError(
                f"RoPE in linear attention needs features elu, got {self.features}; "
                "with other features, rotation would make weights in the normaliser negative"
            )
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
        if isinstance(scaling, FactorScaling) and len(scaling.factors) != width // 2:
            raise ValueError(
                f"got {len(scaling.factors)} RoPE factors for {width // 2} pairs of dims; "
                "give one factor per pair"
            )
    if isinstance(position, ReRope | StreamingRope) and head_dim % 2:
        raise ValueError(f"head_dim={head_dim} must be even for {position.kind}")


Mixer = Annotated[AttentionConfig | LinearAttentionConfig, Field(discriminator="kind")]

# ---- feed-forwards

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "sigmoid"]


class GLUConfig(Config):
    """Gated feed-forward: down(act(gate(x)) ⊙ up(x)) (Shazeer 2020, arXiv 2002.05202).

    It is SwiGLU with `silu`, GEGLU with `gelu`, ReGLU with `relu` and GLU with `sigmoid`.
    """

    kind: Literal["glu"] = "glu"
    intermediate_size: PositiveInt
    activation: Activation = "silu"
    bias: bool = False


class MLPConfig(Config):
    """Feed-forward without a gate: down(act(up(x)))."""

    kind: Literal["mlp"] = "mlp"
    intermediate_size: PositiveInt
    activation: Activation = "gelu"
    bias: bool = True


class MoEConfig(Config):
    """Mixture of experts: a router selects some experts for each token.

    Attributes:
        routing: `softmax_topk` takes the top k of the softmax over all experts (Switch, Qwen),
            `topk_softmax` takes the softmax over the top k logits (Mixtral).
        normalise: whether the weights of the selected experts are divided by their sum
            (`softmax_topk` only; those of `topk_softmax` sum to 1).
        shared: an expert that processes all tokens; `shared_gate` scales its output by a sigmoid
            gate computed from the token (Qwen2-MoE).
        capacity_factor: in training an expert processes at most (T k / E) · factor tokens, and
            tokens over the limit skip it; None sets no limit. In inference no tokens are dropped,
            so that results are independent of the batch composition.
        load_balancing: coefficient of the Switch load-balancing loss E Σ f_i P_i (Fedus et al.
            2021, arXiv 2101.03961, eq. 4).
        z_loss: coefficient of mean(logsumexp(logits)²) (Zoph et al. 2022, arXiv 2202.08906,
            eq. 5).
    """

    kind: Literal["moe"] = "moe"
    num_experts: PositiveInt
    experts_per_token: PositiveInt
    expert: GLUConfig
    routing: Literal["softmax_topk", "topk_softmax"] = "softmax_topk"
    normalise: bool = True
    shared: GLUConfig | None = None
    shared_gate: bool = False
    capacity_factor: PositiveFloat | None = None
    load_balancing: NonNegativeFloat = 0.01
    z_loss: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _fits_together(self) -> "MoEConfig":
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} is more than "
                f"num_experts={self.num_experts}; lower it"
            )
        if self.shared_gate and self.shared is None:
            raise ValueError("shared_gate needs a shared expert; set shared or remove shared_gate")
        return self


FeedForward = Annotated[GLUConfig | MLPConfig | MoEConfig, Field(discriminator="kind")]

# ---- layers and models


class LayerConfig(Config):
    """One layer: a token mixer, a feed-forward, and the placement of their norms.

    `norm_placement`: `pre` is x + f(N(x)), `post` is N(x + f(x)), `sandwich` is x + N(f(N(x))).
    """

    mixer: Mixer
    feed_forward: FeedForward
    norm_placement: Literal["pre", "post", "sandwich"] = "pre"


class ModelConfig(Config):
    """A complete decoder.

    Attributes:
        family: the model family, which defines how the Hugging Face layout is read and written.
        embedding_position: positions that are added to the embedding, not applied in attention.
        embedding_scale: factor on the embedding (Gemma: √D).
        final_norm: whether a norm precedes the output head (post-norm models have none).
        logit_softcap: logits become cap · tanh(logit / cap).
        num_labels: size of a score head (number of classes, or 1 for a reward) that replaces the
            output projection.
        prompt_mask: whether prompt tokens see only earlier tokens (`causal`) or each other in both
            directions (`prefix`; prefix language model: Dong et al. 2019, arXiv 1905.03197).
    """

    family: str
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    max_seq_len: PositiveInt
    layers: tuple[LayerConfig, ...] = Field(min_length=1)
    norm: Norm = RMSNormConfig()
    embedding_position: EmbeddingPosition = NoPosition()
    embedding_scale: PositiveFloat = 1.0
    final_norm: bool = True
    tie_embeddings: bool = False
    logit_softcap: PositiveFloat | None = None
    num_labels: PositiveInt | None = None
    prompt_mask: Literal["causal", "prefix"] = "causal"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

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

    @model_validator(mode="after")
    def _fits_together(self) -> "ModelConfig":
        if isinstance(self.embedding_position, Sinusoidal) and self.hidden_size % 2:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be even for sinusoidal positions"
            )
        mixers = {layer.mixer.kind for layer in self.layers}
        if self.prompt_mask == "prefix" and "linear_attention" in mixers:
            raise ValueError(
                "prompt_mask=prefix needs softmax attention in all layers, but some have linear "
                "attention; set prompt_mask to causal or change the mixers"
            )
        return self
