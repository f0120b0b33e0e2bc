"""The configuration of a training run."""

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
    """Converts 3.0 to 3 for records and messages."""
    return int(number) if number == int(number) else number


Epochs = Annotated[PositiveFloat, PlainSerializer(_whole)]


def _model_kind(value: object) -> str:
    return "source" if isinstance(value, str) else "scratch"


Model = Annotated[
    Annotated[str, Tag("source")] | Annotated[ScratchConfig, Tag("scratch")],
    Discriminator(_model_kind),
]


class EarlyStoppingConfig(Config):
    """Stops a run whose evaluation loss has stopped improving.

    Attributes:
        patience: number of consecutive evaluations without improvement before the run stops.
        min_delta: minimum decrease of the loss, in nats, that counts as an improvement.
    """

    patience: PositiveInt = 3
    min_delta: NonNegativeFloat = 0.0


class SamplesConfig(Config):
    """Sample completions that are generated every `eval_every` steps, for inspection."""

    prompts: Paths
    max_tokens: PositiveInt = 48
    temperature: NonNegativeFloat = 0.0


class TrainConfig(Config):
    """A training run. Without an adapter, all weights are trained.

    Attributes:
        model: the source of a pretrained model, or the description of a new model to build.
        data: the training and evaluation data.
        objective: the loss to minimise.
        adapter: the parameter-efficient method; null trains all weights.
        prompt_mask: `prefix` trains a prefix language model, in which a prompt's tokens attend to
            one another bidirectionally; null keeps the model's own setting.
        optimizer: the optimizer and its hyperparameters.
        parameter_groups: parameters with their own learning rate or weight decay.
        schedule: the learning-rate schedule.
        batch_size: sequences (rows of a corpus) per optimizer step; null if `batch_tokens` is set.
        batch_tokens: minimum number of tokens per optimizer step.
        micro_batch_tokens: maximum number of packed tokens per forward pass; a step accumulates
            gradients over as many micro-batches as it needs.
        epochs: number of passes over the data; may be fractional.
        max_steps, max_tokens: upper bounds on optimizer steps and training tokens.
        clip_norm: maximum global gradient norm; null disables gradient clipping.
        dropout: dropout probability on the outputs of mixers and feed-forward blocks in training.
        precision: `bf16` keeps fp32 master weights and computes in bf16 · `bf16_autocast` keeps
            fp32 weights and uses PyTorch's autocast · `fp16` uses loss scaling · `auto` is bf16
            on hardware with fast bf16, else fp32.
        checkpoint_activations: gradient checkpointing. `full` stores one activation per layer and
            recomputes the rest; `selective` does so for the feed-forward blocks only.
        compile: whether to `torch.compile` every layer's feed-forward block; the compile time is
            reported.
        device: the device to train on.
        seed: seed of all random numbers of the run.
        log_every: steps between lines of metrics.
        eval_every: steps between evaluations; 0 evaluates only at the end.
        save_every: steps between checkpoints; 0 writes none before the end.
        keep_last: number of newest checkpoints to retain.
        keep_best: whether to also retain the checkpoint with the lowest evaluation loss.
        early_stopping: stops the run when the evaluation loss no longer improves.
        samples: completions to generate at each evaluation.
        spike_factor: a loss above this multiple of its running mean is logged as a spike, with the
            ids of the batch's samples.
        tensorboard: whether to also write TensorBoard event files.
        output: the run's folder.
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
                "the size of a step is given in sequences or in tokens; set one of batch_size and "
                "batch_tokens, and set the other to null"
            )
        kind = objective_kind(self.objective)
        if self.data.kind not in kind.data_kinds:
            raise ValueError(
                f"objective {self.objective.kind} does not support data of kind {self.data.kind}; "
                f"it needs data of kind {' or '.join(kind.data_kinds)}"
            )
        if not kind.generates and self.samples is not None:
            raise ValueError(f"a {self.objective.kind} generates no samples; remove samples")
        if self.keep_best and not self.eval_every:
            raise ValueError("keep_best needs evaluations during training; set eval_every")
        if self.early_stopping is not None and not self.eval_every:
            raise ValueError("early_stopping needs evaluations during training; set eval_every")
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
