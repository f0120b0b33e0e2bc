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

from easyllm.adapters import ADAPTERS, AdapterConfig
from easyllm.core.config import Config
from easyllm.models.scratch import ScratchConfig
from easyllm.train.data_config import (
    DATA,
    CorpusDataConfig,
    DataBase,
    DataConfig,
    LabelledDataConfig,
    Paths,
)
from easyllm.train.objectives import (
    OBJECTIVES,
    ClassifierConfig,
    LanguageModelConfig,
    ObjectiveConfig,
    objective_kind,
)
from easyllm.train.optim_config import (
    AdamWConfig,
    CosineConfig,
    Fraction,
    Optimizer,
    ParameterGroup,
    Schedule,
)

Data = Annotated[DataBase, DATA]
Objective = Annotated[ObjectiveConfig, OBJECTIVES]
AnyAdapter = Annotated[AdapterConfig, ADAPTERS]


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
    adapter: AnyAdapter | None = None
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
        kind = objective_kind(self.objective)
        if self.data.kind not in kind.data_kinds:
            raise ValueError(
                f"objective {self.objective.kind} does not go with data of kind {self.data.kind}; "
                f"it needs data of kind {' or '.join(kind.data_kinds)}"
            )
        if not kind.generates and self.samples is not None:
            raise ValueError(f"a {self.objective.kind} writes no samples; remove samples")
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
