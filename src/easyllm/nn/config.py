"""What a decoder is made of. An option lives in the variant that owns it; `kind` tells variants apart."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from easyllm.core.config import Config


class Rope(Config):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864), half-split layout as in HF."""

    kind: Literal["rope"] = "rope"
    theta: PositiveFloat = 10000.0


class NoPosition(Config):
    """No position information besides the causal mask."""

    kind: Literal["none"] = "none"


Position = Annotated[Rope | NoPosition, Field(discriminator="kind")]


class AttentionConfig(Config):
    """Softmax attention; `num_kv_heads` = `num_heads` is MHA, 1 is MQA, between them GQA."""

    kind: Literal["attention"] = "attention"
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    position: Position = Rope()
    qkv_bias: bool = False
    out_bias: bool = False
    causal: bool = True
    window: PositiveInt | None = None

    @model_validator(mode="after")
    def _heads_divide(self) -> "AttentionConfig":
        if self.num_heads % self.num_kv_heads:
            fits = [str(n) for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            raise ValueError(
                f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}; "
                f"set num_kv_heads to {', '.join(fits[:-1])} or {fits[-1]}"
            )
        return self


Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "sigmoid"]


class GLUConfig(Config):
    """down(act(gate(x)) ⊙ up(x)): SwiGLU with `silu` (Shazeer 2020, arXiv 2002.05202)."""

    kind: Literal["glu"] = "glu"
    intermediate_size: PositiveInt
    activation: Activation = "silu"
    bias: bool = False


class RMSNormConfig(Config):
    """x / √(mean(x²) + eps) ⊙ weight (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    kind: Literal["rms_norm"] = "rms_norm"
    eps: PositiveFloat = 1e-5


Mixer = Annotated[AttentionConfig, Field(discriminator="kind")] | AttentionConfig
FeedForward = GLUConfig
Norm = RMSNormConfig


class LayerConfig(Config):
    """One layer: a mixer of tokens, a feed-forward, and where their norms stand."""

    mixer: AttentionConfig
    feed_forward: FeedForward
    norm_placement: Literal["pre"] = "pre"


class ModelConfig(Config):
    """A whole decoder. `family` names the reader and writer of the Hugging Face layout."""

    family: str
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    max_seq_len: PositiveInt
    layers: tuple[LayerConfig, ...] = Field(min_length=1)
    norm: Norm = RMSNormConfig()
    tie_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)
