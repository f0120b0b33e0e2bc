"""The configuration of a training run."""

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
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
from easyllm.core.device import check_device_name
from easyllm.core.errors import ConfigError
from easyllm.core.paths import PathText
from easyllm.models.scratch import ScratchConfig
from easyllm.nn.config import PromptMask
from easyllm.parallel.config import ParallelConfig
from easyllm.quant import check_scheme
from easyllm.train.data_config import (
    DATA,
    ONE_OR_MORE,
    CorpusDataConfig,
    DataBase,
    DataConfig,
    LabelledDataConfig,
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


Texts = Annotated[tuple[str, ...], Field(min_length=1), ONE_OR_MORE]
Epochs = Annotated[PositiveFloat, Field(le=1e9), PlainSerializer(_whole)]


def _model_kind(value: object) -> str:
    return "source" if isinstance(value, str) else "scratch"


Model = Annotated[
    Annotated[str, Tag("source")] | Annotated[ScratchConfig, Tag("scratch")],
    Discriminator(_model_kind),
]


class LossScaleConfig(Config):
    """Dynamic loss scaling for fp16, with DeepSpeed's defaults."""

    initial_power: PositiveInt = Field(
        default=16, description="The first scale is 2 to this power."
    )
    window: PositiveInt = Field(
        default=1000, description="Consecutive steps without overflow before the scale doubles."
    )
    hysteresis: PositiveInt = Field(
        default=2, description="Overflows up to and including the first that halves the scale."
    )
    minimum: PositiveFloat = Field(default=1.0, description="Lower bound of the scale.")


class EarlyStoppingConfig(Config):
    """Stops a run whose evaluation loss has stopped improving."""

    patience: PositiveInt = Field(
        default=3, description="Consecutive evaluations without improvement before the run stops."
    )
    min_delta: NonNegativeFloat = Field(
        default=0.0,
        description="Minimum decrease of the evaluation loss, in nats, that counts as an "
        "improvement.",
    )


class SamplesConfig(Config):
    """Sample completions that are generated every `eval_every` steps, for inspection."""

    prompts: Texts = Field(
        description="Prompts that the model completes, as a list or a single string."
    )
    max_tokens: PositiveInt = Field(
        default=48, description="Maximum number of new tokens per completion."
    )
    temperature: NonNegativeFloat = Field(
        default=0.0, description="Sampling temperature; 0 is greedy decoding."
    )


class TrainConfig(Config):
    """A training run."""

    model: Model = Field(
        default="smollm2",
        description="Source of a pretrained model, or the description of a new model to build.",
    )
    data: Data = Field(
        description="Training and evaluation data, of a kind that the objective supports."
    )
    objective: Objective = Field(default=LanguageModelConfig(), description="The loss to minimise.")
    adapter: AnyAdapter | None = Field(
        default=None, description="Parameter-efficient method; null trains all weights."
    )
    quantize: str | None = Field(
        default=None,
        description="Storage format that the frozen base model is quantized to while it is loaded, "
        "such as nf4 (QLoRA, arXiv 2305.14314), or gguf, which keeps the blocks of a GGUF file; "
        "needs an adapter, whose weights stay in full precision. null keeps the weights as they "
        "are.",
    )
    prompt_mask: PromptMask | None = Field(
        default=None,
        description="`prefix` trains a prefix language model, in which the tokens of a prompt "
        "attend to one another bidirectionally; null keeps the model's own setting.",
    )
    optimizer: Optimizer = Field(
        default=AdamWConfig(), description="The optimizer and its hyperparameters."
    )
    parameter_groups: tuple[ParameterGroup, ...] = Field(
        default=(),
        description="Parameters with their own learning rate or weight decay; the first group "
        "whose pattern matches a name applies.",
    )
    schedule: Schedule = Field(default=CosineConfig(), description="The learning-rate schedule.")
    batch_size: PositiveInt | None = Field(
        default=8,
        description="Sequences (rows of a corpus) per optimizer step; null if batch_tokens is set.",
    )
    batch_tokens: PositiveInt | None = Field(
        default=None,
        description="Minimum number of tokens per optimizer step; null if batch_size is set.",
    )
    micro_batch_tokens: PositiveInt = Field(
        default=2048,
        le=2**31 - 1,
        description="Maximum number of packed tokens per forward pass; a step accumulates "
        "gradients over as many micro-batches as it needs.",
    )
    epochs: Epochs = Field(
        default=1, description="Number of passes over the data; may be fractional."
    )
    max_steps: PositiveInt | None = Field(
        default=None, description="Upper bound on optimizer steps; null sets none."
    )
    max_tokens: PositiveInt | None = Field(
        default=None, description="Upper bound on training tokens; null sets none."
    )
    clip_norm: PositiveFloat | None = Field(
        default=1.0, description="Maximum global gradient norm; null disables gradient clipping."
    )
    dropout: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="Dropout probability on the outputs of mixers and feed-forward blocks in "
        "training.",
    )
    shifted_attention: PositiveInt | None = Field(
        default=None,
        multiple_of=2,
        description="Attention in training is limited to groups of this many tokens, shifted by "
        "half a group in half of the heads (S²-Attn of LongLoRA: arXiv 2309.12307); null attends "
        "to the whole sequence, as inference does.",
    )
    embedding_gradient: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="Factor on the gradient of the embedding as an input; 0.1 keeps the first "
        "layers from diverging in GLM-130B (arXiv 2210.02414, section 3.3).",
    )
    precision: Literal["auto", "bf16", "bf16_autocast", "fp16", "fp32"] = Field(
        default="auto",
        description="`bf16` keeps fp32 master weights and computes in bf16; `bf16_autocast` keeps "
        "fp32 weights and uses PyTorch's autocast; `fp16` uses loss scaling; `auto` is bf16 on "
        "hardware with fast bf16, else fp32.",
    )
    loss_scale: LossScaleConfig = Field(
        default=LossScaleConfig(), description="Dynamic loss scaling; used with precision=fp16."
    )
    checkpoint_activations: Literal["none", "selective", "full"] = Field(
        default="none",
        description="Gradient checkpointing: `full` stores one activation per layer and recomputes "
        "the rest; `selective` does so for the feed-forward blocks only.",
    )
    compile: bool = Field(
        default=False,
        description="Whether to `torch.compile` the feed-forward block of every layer; the compile "
        "time is reported.",
    )
    parallel: ParallelConfig = Field(
        default=ParallelConfig(),
        description="How a run that is launched with several processes is divided among them.",
    )
    deepspeed: PathText | None = Field(
        default=None,
        description="A DeepSpeed configuration (ds_config.json) whose values apply to this run; "
        "keys that it leaves out or sets to auto are the recipe's.",
    )
    backend: Literal["torch", "deepspeed"] = Field(
        default="torch",
        description="What divides a run among processes: `torch` is this package on "
        "torch.distributed, `deepspeed` the engine of DeepSpeed (extra `deepspeed`), driven by the "
        "file that deepspeed names.",
    )
    device: Annotated[str, AfterValidator(check_device_name)] = Field(
        default="auto",
        description="Device to train on; `auto` selects the accelerator if there is one.",
    )
    seed: NonNegativeInt = Field(default=0, description="Seed of all random numbers of the run.")
    log_every: PositiveInt = Field(
        default=1, description="Optimizer steps between lines of metrics."
    )
    eval_every: NonNegativeInt = Field(
        default=0, description="Optimizer steps between evaluations; 0 evaluates only at the end."
    )
    save_every: NonNegativeInt = Field(
        default=50, description="Optimizer steps between checkpoints; 0 writes none before the end."
    )
    save_async: bool = Field(
        default=False,
        description="Whether a checkpoint is copied to host memory and written by a thread while "
        "training continues; needs memory for the copy (the best checkpoint of keep_best is "
        "written at once).",
    )
    keep_last: PositiveInt = Field(default=1, description="Number of newest checkpoints to retain.")
    keep_best: bool = Field(
        default=False,
        description="Whether to also retain the checkpoint with the lowest evaluation loss; needs "
        "eval_every.",
    )
    early_stopping: EarlyStoppingConfig | None = Field(
        default=None,
        description="Stops the run when the evaluation loss no longer improves; needs eval_every; "
        "null never stops early.",
    )
    samples: SamplesConfig | None = Field(
        default=None, description="Completions to generate at each evaluation; null generates none."
    )
    retention: Annotated[tuple[PathText, ...], ONE_OR_MORE] = Field(
        default=(),
        description="Files of conversations or texts (a list, or one path) whose loss is measured "
        "before and after training: it shows what the model forgets.",
    )
    spike_factor: float = Field(
        default=2.0,
        gt=1.0,
        description="A loss above this multiple of its running mean is logged as a spike, with the "
        "ids of the batch's samples.",
    )
    tensorboard: bool = Field(
        default=False, description="Whether to also write TensorBoard event files."
    )
    output: PathText | None = Field(default=None, description="Folder of the run.")

    @model_validator(mode="after")
    def _base_can_be_quantized(self) -> "TrainConfig":
        if self.quantize is None:
            return self
        try:
            check_scheme(self.quantize)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if isinstance(self.model, ScratchConfig):
            raise ValueError(
                f"quantize={self.quantize} needs a pretrained model, but model describes a new "
                "one, all of whose weights are trained; remove quantize"
            )
        if self.adapter is None:
            raise ValueError(
                f"quantize={self.quantize} freezes the weights, so that an adapter is needed to "
                "train; set adapter.kind=lora, or remove quantize"
            )
        return self

    @model_validator(mode="after")
    def _deepspeed_has_its_file(self) -> "TrainConfig":
        if self.backend == "deepspeed" and self.deepspeed is None:
            raise ValueError(
                "backend=deepspeed needs a DeepSpeed configuration; set deepspeed=ds_config.json, "
                "or backend=torch"
            )
        return self

    @model_validator(mode="after")
    def _quantization_aware_trains_all_weights(self) -> "TrainConfig":
        if objective_kind(self.objective).needs_full_weights and self.adapter is not None:
            raise ValueError(
                f"objective.kind={self.objective.kind} trains the weights that it rounds, but "
                f"adapter.kind={self.adapter.kind} leaves them as they are; set adapter=null"
            )
        return self

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
        if self.save_async and getattr(self.optimizer, "paged", False):
            raise ValueError(
                "save_async=true copies the state to memory, which optimizer.paged=true keeps out "
                "of it; remove one of the two"
            )
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
