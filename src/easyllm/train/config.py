"""What a training run is told."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from easyllm.adapters.lora import LoRAConfig
from easyllm.core.config import Config

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Paths = Annotated[tuple[str, ...], Field(min_length=1)]


class DataConfig(Config):
    """Files of conversations, and how they become samples."""

    train: Paths
    eval: tuple[str, ...] = ()
    max_seq_len: int = Field(default=1024, ge=2)
    overlong: Literal["cut", "drop"] = "cut"
    train_on: Literal["assistant", "all"] = "assistant"
    split_turns: bool = False
    """Whether every turn of the assistant becomes a sample of its own, with the turns before it as its prompt."""


class AdamWConfig(Config):
    """AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101, algorithm 2)."""

    kind: Literal["adamw"] = "adamw"
    learning_rate: PositiveFloat = 2e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    """Applied to matrices only, never to norms and biases."""


class CosineConfig(Config):
    """Linear warm-up, then half a cosine down to `floor` of the peak rate."""

    kind: Literal["cosine"] = "cosine"
    warmup_ratio: Fraction = 0.03
    floor: Fraction = 0.0


class TrainConfig(Config):
    """A training run. Without an adapter, every weight is trained."""

    model: str = "smollm2"
    data: DataConfig
    adapter: LoRAConfig | None = None
    prompt_mask: Literal["causal", "prefix"] | None = None
    """`prefix` trains a prefix language model: a prompt's tokens see one another; by default as the model has it."""
    optimizer: AdamWConfig = AdamWConfig()
    schedule: CosineConfig = CosineConfig()
    batch_size: PositiveInt = 8
    """Sequences in an optimizer step."""
    micro_batch_tokens: PositiveInt = 2048
    """Most packed tokens in one forward pass; a step takes as many passes as it needs."""
    epochs: PositiveInt = 1
    max_steps: PositiveInt | None = None
    clip_norm: PositiveFloat | None = 1.0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    device: str = "auto"
    seed: NonNegativeInt = 0
    log_every: PositiveInt = 1
    eval_every: NonNegativeInt = 0
    """Steps between evaluations on `data.eval`; 0 evaluates at the end only."""
    save_every: NonNegativeInt = 50
    """Steps between checkpoints; 0 saves none before the end."""
    keep_last: PositiveInt = 1
    output: str | None = None
