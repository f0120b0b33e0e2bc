"""What an objective is: it owns its data, its loss and its figures, and registers itself with one call.

    class PairLoss(Objective):
        needs_reference = True
        def prepare(self, data, files, tokenizer): ...      # rows → samples, with the extras the loss wants
        def loss(self, model, batch): ...
    register_objective(PairLossConfig, build=PairLoss, data=(PairsConfig,))

From then on `objective: {kind: pair_loss}` with `data: {kind: pairs, train: [...]}` is trained by the ordinary trainer.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from easyllm.batches.packing import Batch, pack
from easyllm.core.config import Config
from easyllm.core.kinds import Kinds
from easyllm.examples.prepare import Account
from easyllm.examples.sample import AnySample
from easyllm.nn.context import AdapterRows, ForwardContext
from easyllm.nn.decoder import Decoder
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.train.data_config import DATA, DataBase, RowsConfig


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Summed loss in nats with gradient, the tokens in the sum, and figures to log.

    The loop divides by the number of terms of the whole step (all micro-batches, all ranks), never by a
    micro-batch's own: a mean of means weighs tokens unequally.

    Attributes:
        sum: summed over tokens (for an objective of sequences or pairs, over those).
        num_tokens: terms in the sum, `Objective.num_terms` of the batch.
        auxiliary: further terms to minimise, on the scale of `sum`, reported apart.
        metrics: means over the batch's tokens, by name.
    """

    sum: Tensor
    num_tokens: int
    auxiliary: Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)


BASE_ONLY = ForwardContext.packed([0], adapters=AdapterRows.of_sequences([""], [0]))
"""A context of no rows in particular: what is asked for is the base."""


@dataclass(frozen=True, slots=True)
class Reference:
    """The model a run started from, frozen: what an objective compares the trained model with.

    Attributes:
        model: the trained model itself where its adapter is what is trained and can be passed over, else a second one.
        without_adapter: whether the model's adapter is passed over.
    """

    model: Decoder
    without_adapter: bool

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        """Final hidden states [T, D] of a batch, ready for `head`."""
        training = self.model.training
        self.model.eval()
        hidden: Tensor = self.model(batch.token_ids, batch.context(base_only=self.without_adapter))
        self.model.train(training)
        return hidden

    @torch.no_grad()
    def head(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] in fp32 of chosen rows of `hidden`, by the head the run started from."""
        logits: Tensor = self.model.head(hidden, BASE_ONLY if self.without_adapter else None)
        return logits


class Objective:
    """A loss over packed batches, and what belongs to it.

    Attributes:
        needs_reference: whether the run gives it the model it started from, as `reference`.
        generates: whether the model it trains writes text, so that a run can show samples.
        also_trained: modules that are trained whole besides an adapter.
    """

    needs_reference: bool = False
    generates: bool = True
    also_trained: tuple[str, ...] = ()
    reference: Reference | None = None

    def prepare(
        self, data: RowsConfig, files: Sequence[Path], tokenizer: Tokenizer
    ) -> tuple[Sequence[AnySample], Account]:
        """Samples of data files.

        Raises:
            DataError: a row cannot be used (its place is named), or nothing is left to train on.
        """
        raise NotImplementedError

    def collate(self, samples: Sequence[AnySample]) -> Batch:
        """A batch of samples of rows (`prepare`); a corpus is cut into batches that every objective takes as they are."""
        return pack(samples)

    def prepare_model(self, model: Decoder, *, seed: int) -> Decoder:  # noqa: ARG002 - for fresh heads
        """The model with what the objective needs of it: a head of labels, say."""
        return model

    def num_terms(self, batch: Batch) -> int:
        """What `loss` sums over: labelled tokens, unless an objective counts otherwise (pairs, texts)."""
        return batch.num_trained

    def loss(self, model: Decoder, batch: Batch) -> LossOutput:
        """The loss of a batch, summed over `num_terms`."""
        raise NotImplementedError

    @torch.no_grad()
    def evaluate(self, model: Decoder, batches: Iterable[Batch]) -> dict[str, float]:
        """`loss_nats`, the mean over everything that carries a loss, and the means of the loss's own figures."""
        training = model.training
        model.eval()
        total, count, figures = 0.0, 0, dict[str, float]()
        try:
            for batch in batches:
                output = self.loss(model, batch.to(model.device))
                total += output.sum.item()
                count += output.num_tokens
                for name, value in output.metrics.items():
                    figures[name] = figures.get(name, 0.0) + value * output.num_tokens
        finally:
            model.train(training)
        means = {name: value / max(1, count) for name, value in figures.items()}
        return {"loss_nats": total / max(1, count)} | means


class ObjectiveConfig(Config):
    """What every objective is told."""

    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveKind:
    """A registered objective.

    Attributes:
        build: from its configuration.
        data: kinds of data it is trained on.
        generates: as `Objective.generates`.
    """

    config: type[ObjectiveConfig]
    build: Callable[[Any], Objective]
    data: tuple[type[DataBase], ...]
    generates: bool

    @property
    def data_kinds(self) -> list[str]:
        """Names of the kinds of data it takes."""
        return [data.model_fields["kind"].default for data in self.data]


OBJECTIVES = Kinds("objective", default="language_model")
"""What `objective:` of a recipe may be."""
_KINDS: dict[str, ObjectiveKind] = {}


def register_objective(
    config: type[ObjectiveConfig],
    *,
    build: Callable[[Any], Objective],
    data: tuple[type[DataBase], ...],
    generates: bool = True,
) -> None:
    """Makes an objective, and the kinds of data it takes, known to recipes and the trainer.

    Raises:
        ValueError: its kind is taken, or a kind of data is registered with another configuration.
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
    _KINDS[kind] = ObjectiveKind(config=config, build=build, data=data, generates=generates)


def unregister_objective(kind: str) -> None:
    """Removes an objective and the kinds of data that no other takes: for tests that registered their own."""
    OBJECTIVES.unregister(kind)
    removed = _KINDS.pop(kind)
    still = {data for other in _KINDS.values() for data in other.data}
    for data in removed.data:
        if data not in still:
            DATA.unregister(data.model_fields["kind"].default)


def objective_kind(config: ObjectiveConfig) -> ObjectiveKind:
    """The registered objective of a configuration."""
    return _KINDS[config.kind]


def build_objective(config: ObjectiveConfig) -> Objective:
    """The objective of a configuration."""
    return objective_kind(config).build(config)


__all__ = [
    "OBJECTIVES",
    "LossOutput",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveKind",
    "Reference",
    "build_objective",
    "objective_kind",
    "register_objective",
    "unregister_objective",
]
