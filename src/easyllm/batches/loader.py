"""Yields the micro-batches of each step in a seeded order.

The position is just two integers (epoch and cursor), so a run resumes exactly.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch

from easyllm.batches.packing import Batch, pack, split_by_tokens
from easyllm.batches.rank_share import RankShare
from easyllm.core.errors import ConfigError
from easyllm.examples.sample import AnySample

PLANNED_STEPS = 200
"""Steps whose micro-batches are measured before a run, to plan its memory."""


@dataclass(slots=True)
class LoaderState:
    """The position of the next step.

    Attributes:
        epoch: number of complete passes over the data.
        cursor: number of samples (or rows) of the epoch that have been consumed.
    """

    epoch: int = 0
    cursor: int = 0

    def as_dict(self) -> dict[str, int]:
        """Returns plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSize:
    """The largest micro-batch of a run's steps, which determines its memory.

    Attributes:
        tokens: most tokens in a micro-batch.
        trained: most tokens with a loss in a micro-batch.
        longest: most tokens in a sequence.
        micro_batches: most micro-batches in a step.
    """

    tokens: int
    trained: int
    longest: int
    micro_batches: int


class StepLoader(Protocol):
    """Yields the micro-batches of consecutive steps; `state` is its position, for checkpoints."""

    state: Any
    last: list[int]
    """Indices of the samples or rows in the most recent step."""
    share: RankShare | None
    """This rank's share of every step; None in a single process."""
    figures: Mapping[str, float]
    """Metrics of the most recent step's data, by the names that they have in `metrics.jsonl`."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps per epoch."""

    def next_step(self) -> list[Batch]:
        """Returns the micro-batches of the next step."""

    def largest_step(self, steps: int) -> StepSize:
        """Returns the size of the largest micro-batch in the first `steps` steps, or a bound."""


def with_fillers(batches: list[Batch], fillers: int) -> list[Batch]:
    """Returns micro-batches, the last `fillers` of them marked as such."""
    kept = len(batches) - fillers
    return batches[:kept] + [replace(batch, is_filler=True) for batch in batches[kept:]]


class Loader:
    """Yields the micro-batches of one optimizer step after another, without end.

    Args:
        samples: all samples.
        batch_size: samples per step; None if `batch_tokens` gives the step size.
        batch_tokens: minimum number of tokens per step.
        micro_batch_tokens: maximum number of tokens in one packed micro-batch; a longer sample
            forms its own micro-batch.
        seed: seed of the sample order, which is different in each epoch; None keeps the order of
            the data.
        collate: builds a batch from samples.

    Raises:
        ConfigError: there are no samples.
    """

    def __init__(
        self,
        samples: Sequence[AnySample],
        *,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        micro_batch_tokens: int,
        seed: int | None,
        collate: Callable[[Sequence[AnySample]], Batch] = pack,
    ) -> None:
        assert (batch_size is None) != (batch_tokens is None), "exactly one gives the step size"
        if not samples:
            raise ConfigError("there are no samples to train on; check the data files")
        self.samples, self.batch_size, self.batch_tokens = samples, batch_size, batch_tokens
        self.micro_batch_tokens, self.seed, self.collate = micro_batch_tokens, seed, collate
        self.state = LoaderState()
        self.last: list[int] = []
        self.figures: Mapping[str, float] = {}
        self.share: RankShare | None = None
        """This rank's share of every step, if a run is divided among ranks."""
        self._order: tuple[int, list[int]] | None = None

    @cached_property
    def steps_per_epoch(self) -> int:
        """Number of steps in the first epoch.

        With `batch_tokens` the number varies slightly between epochs, because samples are grouped
        differently.
        """
        steps, cursor, order = 0, 0, self._epoch_order(0)
        while cursor < len(order):
            cursor += len(self._take(order, cursor))
            steps += 1
        return steps

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            yield self.next_step()

    def next_step(self) -> list[Batch]:
        """Returns the micro-batches of the next step; the last step of an epoch may be smaller."""
        order = self._epoch_order(self.state.epoch)
        chosen = self.last = self._take(order, self.state.cursor)
        self.state.cursor += len(chosen)
        if self.state.cursor >= len(order):
            self.state = LoaderState(self.state.epoch + 1, 0)
        samples = [self.samples[i] for i in chosen]
        if self.share is None:
            groups = split_by_tokens(samples, self.micro_batch_tokens)
            return [self.collate(group) for group in groups]
        sizes = [sample.num_tokens for sample in samples]
        numbers, fillers = self.share.groups(sizes, self.micro_batch_tokens)
        batches = [self.collate([samples[n] for n in group]) for group in numbers]
        return with_fillers(batches, fillers)

    def largest_step(self, steps: int) -> StepSize:
        """Returns the size of the largest micro-batch in the first `steps` steps.

        At most `PLANNED_STEPS` steps are read, all of the first epoch.
        """
        order, cursor = self._epoch_order(0), 0
        tokens = trained = longest = count = 0
        for _ in range(min(steps, PLANNED_STEPS)):
            chosen = self._take(order, cursor)
            if not chosen:
                break
            cursor += len(chosen)
            groups = split_by_tokens([self.samples[i] for i in chosen], self.micro_batch_tokens)
            count = max(count, len(groups))
            for group in groups:
                tokens = max(tokens, sum(sample.num_tokens for sample in group))
                trained = max(trained, sum(sample.num_trained for sample in group))
                parts = (part for sample in group for part in sample.parts)
                longest = max(longest, *(part.num_tokens for part in parts))
        return StepSize(tokens=tokens, trained=trained, longest=longest, micro_batches=count)

    def samples_of(self, steps: int) -> list[AnySample]:
        """Returns the samples that the first `steps` steps contain, each once, in stored order."""
        found, epoch, cursor = set[int](), 0, 0
        for _ in range(steps):
            order = self._epoch_order(epoch)
            chosen = self._take(order, cursor)
            found.update(chosen)
            cursor += len(chosen)
            if cursor >= len(order):
                epoch, cursor = epoch + 1, 0
            if len(found) == len(self.samples):
                break
        return [self.samples[index] for index in sorted(found)]

    def _take(self, order: list[int], cursor: int) -> list[int]:
        """Returns the indices of the samples in the step that begins at `cursor`."""
        if self.batch_size is not None:
            return order[cursor : cursor + self.batch_size]
        assert self.batch_tokens is not None, "checked by the constructor"
        end, tokens = cursor, 0
        while end < len(order) and tokens < self.batch_tokens:
            tokens += self.samples[order[end]].num_tokens
            end += 1
        return order[cursor:end]

    def _epoch_order(self, epoch: int) -> list[int]:
        if self._order is None or self._order[0] != epoch:
            order = list(range(len(self.samples)))
            if self.seed is not None:
                generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
                order = torch.randperm(len(order), generator=generator).tolist()
            self._order = (epoch, order)
        return self._order[1]
