"""What a training run is told."""

from typing import Annotated, Literal

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PlainSerializer,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from easyllm.adapters.lora import LoRAConfig
from easyllm.core.config import Config, kind_or
from easyllm.models.scratch import ScratchConfig
from easyllm.train.optim_config import (
    AdamWConfig,
    CosineConfig,
    Fraction,
    Optimizer,
    ParameterGroup,
    Schedule,
)

Paths = Annotated[tuple[str, ...], Field(min_length=1)]

# ---- data


class DataConfig(Config):
    """Files of conversations, and how they become samples."""

    kind: Literal["conversations"] = "conversations"
    train: Paths
    eval: tuple[str, ...] = ()
    max_seq_len: int = Field(default=1024, ge=2)
    overlong: Literal["cut", "drop"] = "cut"
    train_on: Literal["assistant", "all"] = "assistant"
    split_turns: bool = False
    """Whether every turn of the assistant becomes a sample of its own, with the turns before it as its prompt."""


class CorpusDataConfig(Config):
    """Token shards that `easyllm data build` made, cut into rows.

    Attributes:
        shards: their folder.
        validation: a folder of shards to evaluate on; by default the `validation` folder inside, where there is one.
        max_seq_len: tokens of a row; documents in a row are isolated from each other.
        eval_tokens: most tokens of an evaluation.
    """

    kind: Literal["corpus"] = "corpus"
    shards: str
    validation: str | None = None
    max_seq_len: int = Field(default=1024, ge=2)
    eval_tokens: PositiveInt = 2**16


class LabelledDataConfig(Config):
    """Rows of a text and a label (a class by name or number, or a number to regress on), for a head of labels."""

    kind: Literal["labels"] = "labels"
    train: Paths
    eval: tuple[str, ...] = ()
    text_key: str = "text"
    label_key: str = "label"
    max_seq_len: int = Field(default=1024, ge=2)


Data = Annotated[
    Annotated[DataConfig, Tag("conversations")]
    | Annotated[CorpusDataConfig, Tag("corpus")]
    | Annotated[LabelledDataConfig, Tag("labels")],
    kind_or("conversations"),
]

# ---- objectives


class LanguageModelConfig(Config):
    """Next-token prediction.

    Attributes:
        label_smoothing: share of the target's probability spread over the vocabulary (Szegedy et al. 2015, arXiv 1512.00567).
        z_loss: coefficient of log²Z, which keeps the softmax's normaliser near 1 (Chowdhery et al. 2022, arXiv 2204.02311).
    """

    kind: Literal["language_model"] = "language_model"
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    z_loss: NonNegativeFloat = 0.0


class ClassifierConfig(Config):
    """Cross-entropy of a head of labels on each text's last token; squared error where `num_labels` is 1."""

    kind: Literal["classifier"] = "classifier"
    num_labels: PositiveInt = 2


Objective = Annotated[
    Annotated[LanguageModelConfig, Tag("language_model")]
    | Annotated[ClassifierConfig, Tag("classifier")],
    kind_or("language_model"),
]

# ---- the run


def _whole(number: float) -> int | float:
    """3, not 3.0, in records and messages."""
    return int(number) if number == int(number) else number


Epochs = Annotated[PositiveFloat, PlainSerializer(_whole)]


def _model_kind(value: object) -> str:
    return "source" if isinstance(value, str) else "scratch"


Model = Annotated[
    Annotated[str, Tag("source")] | Annotated[ScratchConfig, Tag("scratch")],
    Discriminator(_model_kind),
]


class EarlyStoppingConfig(Config):
    """Ends a run whose evaluation loss has not fallen by `min_delta` nats for `patience` evaluations."""

    patience: PositiveInt = 3
    min_delta: NonNegativeFloat = 0.0


class SamplesConfig(Config):
    """Generations to look at, every `eval_every` steps."""

    prompts: Paths
    max_tokens: PositiveInt = 48
    temperature: NonNegativeFloat = 0.0


class TrainConfig(Config):
    """A training run. Without an adapter, every weight is trained.

    Attributes:
        model: a model's source, or a fresh model to build.
        prompt_mask: `prefix` trains a prefix language model: a prompt's tokens see one another; by default as the model
            has it.
        batch_size: sequences (rows of a corpus) in an optimizer step; null where `batch_tokens` says how large a step is.
        batch_tokens: tokens in a step, at least.
        micro_batch_tokens: most packed tokens in one forward pass; a step takes as many passes as it needs.
        precision: `bf16` keeps fp32 masters and computes in bf16 · `bf16_autocast` keeps fp32 weights and lets
            PyTorch choose · `fp16` scales the loss · `auto` is bf16 where the machine is fast at it.
        dropout: of the outputs of mixers and feed-forwards, in training.
        checkpoint_activations: `full` keeps one activation a layer and computes the rest again; `selective` does so for
            the feed-forwards alone.
        compile: `torch.compile` of every layer's feed-forward; the time it takes is shown.
        save_every: steps between checkpoints; 0 saves none before the end.
        keep_last, keep_best: how many of the newest checkpoints stay, and whether the one with the lowest evaluation loss.
        eval_every: steps between evaluations; 0 evaluates at the end only.
        spike_factor: a loss above so many times the running mean is marked with its batch's ids.
    """

    model: Model = "smollm2"
    data: Data
    objective: Objective = LanguageModelConfig()
    adapter: LoRAConfig | None = None
    prompt_mask: Literal["causal", "prefix"] | None = None
    optimizer: Optimizer = AdamWConfig()
    parameter_groups: tuple[ParameterGroup, ...] = ()
    schedule: Schedule = CosineConfig()
    batch_size: PositiveInt | None = 8
    batch_tokens: PositiveInt | None = None
    micro_batch_tokens: PositiveInt = 2048
    epochs: Epochs = 1
    max_steps: PositiveInt | None = None
    max_tokens: PositiveInt | None = None
    clip_norm: PositiveFloat | None = 1.0
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    precision: Literal["auto", "bf16", "bf16_autocast", "fp16", "fp32"] = "auto"
    checkpoint_activations: Literal["none", "selective", "full"] = "none"
    compile: bool = False
    device: str = "auto"
    seed: NonNegativeInt = 0
    log_every: PositiveInt = 1
    eval_every: NonNegativeInt = 0
    save_every: NonNegativeInt = 50
    keep_last: PositiveInt = 1
    keep_best: bool = False
    early_stopping: EarlyStoppingConfig | None = None
    samples: SamplesConfig | None = None
    spike_factor: Annotated[float, Field(gt=1.0)] = 2.0
    tensorboard: bool = False
    output: str | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "TrainConfig":
        if (self.batch_size is None) == (self.batch_tokens is None):
            raise ValueError(
                "a step is measured in sequences or in tokens; give batch_size or batch_tokens, and set the other to null"
            )
        classifies = isinstance(self.objective, ClassifierConfig)
        if classifies != isinstance(self.data, LabelledDataConfig):
            raise ValueError(
                f"objective {self.objective.kind} does not go with data of kind {self.data.kind}; "
                "a classifier needs data of kind labels, a language_model conversations or a corpus"
            )
        if classifies and self.samples is not None:
            raise ValueError("a classifier writes no samples; remove samples")
        if self.keep_best and not self.eval_every:
            raise ValueError("keep_best needs evaluations on the way; set eval_every")
        if self.early_stopping is not None and not self.eval_every:
            raise ValueError("early_stopping needs evaluations on the way; set eval_every")
        return self


__all__ = [
    "AdamWConfig",
    "ClassifierConfig",
    "CorpusDataConfig",
    "CosineConfig",
    "DataConfig",
    "Fraction",
    "LabelledDataConfig",
    "LanguageModelConfig",
    "ParameterGroup",
    "TrainConfig",
]
