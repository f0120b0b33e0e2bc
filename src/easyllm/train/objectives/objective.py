"""The interface of an objective: its data preparation, its loss and its metrics.

An objective is registered with one call:

    class PairLoss(Objective):
        needs_reference = True
        def prepare(self, data, files, tokenizer): ...  # rows → samples, with the loss's extras
        def loss(self, model, batch): ...
    register_objective(PairLossConfig, build=PairLoss, data=(PairsConfig,))

After that, the ordinary trainer accepts `objective: {kind: pair_loss}` with
`data: {kind: pairs, train: [...]}`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from easyllm.adapters import AdapterConfig
from easyllm.batches.loader import Loader, StepLoader, StepSize
from easyllm.batches.packing import Batch, pack, split_by_tokens
from easyllm.batches.rank_share import Ranks
from easyllm.batches.shared_prompts import (
    ANSWERS,
    num_shared_tokens,
    shared_lengths,
    shares_prompts,
)
from easyllm.core.config import Config
from easyllm.core.kinds import Kinds
from easyllm.examples.prepare import PreparationStats
from easyllm.examples.sample import AnySample
from easyllm.nn.config import ModelConfig
from easyllm.nn.context import AdapterRows, ForwardContext
from easyllm.nn.decoder import Decoder
from easyllm.ops.packed_linear import dequantized_products
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.train.data_config import DATA, DataBase, GeneratedConfig, RowsConfig
from easyllm.train.evaluating import evaluating
from easyllm.train.objectives.losses import LossOutput, evaluate_loss
from easyllm.train.optim_config import Optimizer

BASE_ONLY = ForwardContext.packed([0], adapters=AdapterRows.of_sequences([""], [0]))
"""A forward context that selects the base model, without any adapter."""


@dataclass(frozen=True, slots=True)
class Reference:
    """The frozen reference model of some objectives: the initial model of the run.

    Attributes:
        model: the trained model itself if only its adapter is trained and can be bypassed, else a
            separate frozen copy of the initial model.
        without_adapter: whether the model's adapter is bypassed.
    """

    model: Decoder
    without_adapter: bool

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        """Returns the final hidden states [T, D] of a batch, the input of `head`."""
        context = batch.context(mask=self.model.config, base_only=self.without_adapter)
        with evaluating(self.model), dequantized_products():
            hidden: Tensor = self.model(batch.token_ids, context)
        return hidden

    @torch.no_grad()
    def head(self, hidden: Tensor) -> Tensor:
        """Returns the reference model's fp32 logits [N, V] for selected rows `hidden: [N, D]`."""
        with dequantized_products():
            logits: Tensor = self.model.head(hidden, BASE_ONLY if self.without_adapter else None)
        return logits


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSizes:
    """The sizes of a step.

    Attributes:
        batch_size: samples per step; None if `batch_tokens` gives the size.
        batch_tokens: minimum number of tokens per step.
        micro_batch_tokens: maximum number of tokens per micro-batch.
        seed: seed of the run.
    """

    batch_size: int | None
    batch_tokens: int | None
    micro_batch_tokens: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSetup:
    """What an objective is told when its run starts.

    Attributes:
        model: the model to train, with its adapter.
        tokenizer: its tokenizer.
        optimizer: the optimizer's configuration.
        clip_norm: maximum gradient norm, or None.
        drops: whether the model is trained with dropout, in its layers or its adapter.
        seed: seed of the run.
    """

    model: Decoder
    tokenizer: Tokenizer
    optimizer: Optimizer
    clip_norm: float | None
    drops: bool
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySetup:
    """How a run trains, as far as the memory of its objective depends on it.

    Attributes:
        itemsize: bytes per element of weights and activations.
        adapter: the adapter that is trained; None if all weights are.
        scheme: storage format of the frozen weights; None if they are not quantized.
        step: size of the largest step.
    """

    itemsize: int
    adapter: AdapterConfig | None
    scheme: str | None
    step: StepSize


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """How fast a machine computes and reads.

    Attributes:
        itemsize: bytes per element of weights and activations.
        flops_per_s: FLOP/s that a run reaches.
        read_bytes_per_s: memory bandwidth in bytes/s.
    """

    itemsize: int
    flops_per_s: float
    read_bytes_per_s: float


class Objective:
    """A loss over packed batches, with its data preparation and metrics.

    Attributes:
        needs_reference: whether the run must set `reference`.
        caches_reference: whether the run must set `cached_reference`, before its first step.
        reference_source: source of a reference model other than the initial model, or None.
        generates: whether the trained model generates text, so that a run can show samples.
        also_trained: base modules that are fully trained in addition to an adapter.
        evaluates_start: whether evaluations during a run include one before the first step.
        undivided: why several processes cannot share its steps; empty if they can.
        generates_data: whether it samples from the model that is trained, which takes all weights.
        ranks: the processes that share its steps; None if there is one.
        loss_is_steady: whether a loss far above its running mean is unusual.
        reference: the reference model, set by the run if `needs_reference`.
        cached_reference: summed log-probabilities of sequences under the reference model, by the
            hash of the sequence (`objectives.reference`).
    """

    needs_reference: bool = False
    caches_reference: bool = False
    reference_source: str | None = None
    generates: bool = True
    also_trained: tuple[str, ...] = ()
    loss_is_steady: bool = True
    evaluates_start: bool = False
    undivided: str = ""
    generates_data: bool = False
    ranks: Ranks | None = None
    reference: Reference | None = None
    cached_reference: Mapping[str, float] | None = None

    def prepare(
        self, data: RowsConfig | GeneratedConfig, files: Sequence[Path], tokenizer: Tokenizer
    ) -> tuple[Sequence[AnySample], PreparationStats]:
        """Reads data files and converts their rows to samples.

        Returns:
            The samples, and counts of the rows that were used, truncated or dropped.

        Raises:
            DataError: a row cannot be used (the message has its location), or no training sample
                remains.
        """
        raise NotImplementedError

    def prepare_eval(
        self, data: RowsConfig | GeneratedConfig, files: Sequence[Path], tokenizer: Tokenizer
    ) -> Sequence[AnySample]:
        """Reads, or generates, the rows to evaluate on; arguments and errors as for `prepare`."""
        samples, _ = self.prepare(data, files, tokenizer)
        return samples

    def build_loader(self, samples: Sequence[AnySample], sizes: StepSizes) -> StepLoader:
        """Returns what yields the micro-batches of each step: the samples in a seeded order."""
        return Loader(
            samples,
            batch_size=sizes.batch_size,
            batch_tokens=sizes.batch_tokens,
            micro_batch_tokens=sizes.micro_batch_tokens,
            seed=sizes.seed,
            collate=self.collate,
        )

    def num_shared_tokens(self, samples: Sequence[AnySample]) -> int:
        """Returns how many tokens of an epoch are in prompts that are computed for others.

        They are counted as tokens of the data, but take no time where prompts are shared.
        """
        return num_shared_tokens(samples)

    def shared_lengths(self, model: Decoder, batches: Sequence[Batch]) -> tuple[int, ...]:
        """Returns the lengths of the prompts that the batches' losses do not compute again."""
        if not shares_prompts(model.config, model.num_virtual_tokens):
            return ()
        return tuple(
            n for batch in batches if ANSWERS in batch.extras for n in shared_lengths(batch)
        )

    def start(self, setup: RunSetup) -> None:
        """Called once the model is built, before a checkpoint is restored and the first step."""

    def held_bytes(
        self,
        model: ModelConfig,  # noqa: ARG002 - in overrides
        setup: MemorySetup,  # noqa: ARG002
    ) -> dict[str, int]:
        """Returns the bytes that the objective itself holds during the steps, by what they are.

        The reference is not among them: the run knows about it.
        """
        return {}

    def sampling_seconds(
        self,
        model: ModelConfig,  # noqa: ARG002 - in overrides
        loader: StepLoader,  # noqa: ARG002
        steps: int,  # noqa: ARG002
        speed: Callable[[], Speed],  # noqa: ARG002
    ) -> float:
        """Returns the seconds that a run of `steps` steps takes in addition to its updates.

        `speed` measures the machine, if that is needed.
        """
        return 0.0

    def after_backward(self, gradient_scale: float, rate_factor: float) -> None:
        """Called before the optimizer step, once all gradients are accumulated and finite.

        Args:
            gradient_scale: the factor from `parameter.grad` to the true gradient.
            rate_factor: the schedule's factor on the learning rates.
        """

    def tensors(self) -> dict[str, Tensor]:
        """Returns the objective's own state by name, for a checkpoint."""
        return {}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores what `tensors` returned, bitwise exactly."""

    def collate(self, samples: Sequence[AnySample]) -> Batch:
        """Returns a packed batch of samples from `prepare`.

        Corpora do not pass through here: they are split into batches that every objective accepts.
        """
        return pack(samples)

    def prepare_model(self, model: Decoder, *, seed: int) -> Decoder:  # noqa: ARG002 - in overrides
        """Returns the model with what the objective requires, such as a classification head."""
        return model

    def num_terms(self, batch: Batch) -> int:
        """Returns the number of terms in `loss`: labelled tokens by default (or pairs, texts)."""
        return batch.num_trained

    def begin_step(self, model: Decoder, batches: Sequence[Batch]) -> None:
        """Called before the losses of a step, with all its micro-batches.

        An objective computes here what depends on the complete step, without gradients.
        """

    def loss(self, model: Decoder, batch: Batch) -> LossOutput:
        """Returns the loss of a batch, summed over `num_terms` terms."""
        raise NotImplementedError

    def evaluate(self, model: Decoder, batches: Iterable[Batch]) -> dict[str, float]:
        """Returns `loss_nats`, the mean loss per term, and the means of the objective's metrics."""
        with self.products():
            mean = evaluate_loss(model, batches, self.loss)
        return {"loss_nats": mean.nats} | mean.metrics

    def evaluate_samples(
        self, model: Decoder, samples: Sequence[AnySample], micro_batch_tokens: int
    ) -> dict[str, float]:
        """Returns the metrics of a model on the samples of `prepare_eval`."""
        groups = split_by_tokens(samples, micro_batch_tokens)
        return self.evaluate(model, (self.collate(group) for group in groups))

    @property
    def is_relative(self) -> bool:
        """Whether the loss compares log-probabilities with ones that have no gradient."""
        return self.needs_reference or self.caches_reference

    def products(self) -> AbstractContextManager[None]:
        """Returns the context of the loss, in training and evaluation.

        With quantized weights, losses that compare use the same products for both sides.
        """
        return dequantized_products() if self.is_relative else nullcontext()

    def monitored(self, figures: Mapping[str, float]) -> float:
        """Returns the number that decides which weights are best: lower is better.

        Args:
            figures: the metrics of an evaluation, as they are logged (`eval/loss_nats`).
        """
        return figures["eval/loss_nats"]


class ObjectiveConfig(Config):
    """The base class of objective configurations."""

    kind: str = Field(description="Name of the objective; each subclass sets its own.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveKind:
    """A registered objective.

    Attributes:
        config: the configuration class.
        build: constructs the objective from its configuration.
        data: configuration classes of the data kinds it accepts.
        generates: as `Objective.generates`.
        needs_full_weights: whether the base's weights must be trained, without an adapter.
    """

    config: type[ObjectiveConfig]
    build: Callable[[Any], Objective]
    data: tuple[type[DataBase], ...]
    generates: bool
    needs_full_weights: bool

    @property
    def data_kinds(self) -> list[str]:
        """Names of the data kinds it accepts."""
        return [data.model_fields["kind"].default for data in self.data]


OBJECTIVES = Kinds("objective", default="language_model")
"""The kinds that a recipe may set under `objective:`."""
_KINDS: dict[str, ObjectiveKind] = {}


def register_objective(
    config: type[ObjectiveConfig],
    *,
    build: Callable[[Any], Objective],
    data: tuple[type[DataBase], ...],
    generates: bool = True,
    needs_full_weights: bool = False,
) -> None:
    """Registers an objective, and the data kinds it accepts, for recipes and the trainer.

    Args:
        config: the configuration class; its `kind` default is the name in recipes.
        build: constructs the objective from its configuration.
        data: configuration classes of the data kinds it accepts.
        generates: whether the trained model generates text.
        needs_full_weights: whether the base's weights must be trained, without an adapter.

    Raises:
        ValueError: the kind is already registered, or a data kind is registered with another
            configuration class.
    """
    new = [each for each in data if each not in DATA.variants]
    for each in new:
        DATA.register(each)
    try:
        OBJECTIVES.register(config)
    except ValueError:
        for each in new:
            DATA.unregister(each.model_fields["kind"].default)
        raise
    kind = config.model_fields["kind"].default
    _KINDS[kind] = ObjectiveKind(
        config=config,
        build=build,
        data=data,
        generates=generates,
        needs_full_weights=needs_full_weights,
    )


def unregister_objective(kind: str) -> None:
    """Unregisters an objective, and data kinds that no other accepts; used by tests."""
    OBJECTIVES.unregister(kind)
    removed = _KINDS.pop(kind)
    still = {data for other in _KINDS.values() for data in other.data}
    for data in removed.data:
        if data not in still:
            DATA.unregister(data.model_fields["kind"].default)


def objective_kind(config: ObjectiveConfig) -> ObjectiveKind:
    """Returns the registered objective of a configuration."""
    return _KINDS[config.kind]


def build_objective(config: ObjectiveConfig) -> Objective:
    """Builds the objective of a configuration."""
    return objective_kind(config).build(config)


__all__ = [
    "OBJECTIVES",
    "LossOutput",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveKind",
    "Reference",
    "RunSetup",
    "StepSizes",
    "build_objective",
    "objective_kind",
    "register_objective",
    "unregister_objective",
]
