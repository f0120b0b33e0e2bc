"""Steps of micro-batches in a seeded order; the whole position is two integers, so resuming is exact."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import torch

from easyllm.core.errors import ConfigError
from easyllm.data.packing import AnySample, Batch, pack, split_by_tokens


@dataclass(slots=True)
class LoaderState:
    """Where the next step begins."""

    epoch: int = 0
    cursor: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class Loader:
    """Yields the micro-batches of one optimizer step after the other, for ever.

    Args:
        samples: all samples.
        batch_size: sequences in a step; None where `batch_tokens` says how large a step is.
        batch_tokens: tokens in a step, at least.
        micro_batch_tokens: most tokens in one packed micro-batch.
        seed: of the order, which differs from epoch to epoch; None keeps the order of the data.
        collate: makes a batch of samples.

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
        assert (batch_size is None) != (batch_tokens is None), "a step has one measure"
        if not samples:
            raise ConfigError("there are no samples to train on; check the data files")
        self.samples, self.batch_size, self.batch_tokens = samples, batch_size, batch_tokens
        self.micro_batch_tokens, self.seed, self.collate = micro_batch_tokens, seed, collate
        self.state = LoaderState()
        self.last: list[int] = []
        self._order: tuple[int, list[int]] | None = None

    @cached_property
    def steps_per_epoch(self) -> int:
        """Steps of the first epoch; with `batch_tokens` those of others differ a little, as samples fall together otherwise."""
        steps, cursor, order = 0, 0, self._epoch_order(0)
        while cursor < len(order):
            cursor += len(self._take(order, cursor))
            steps += 1
        return steps

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            yield self.next_step()

    def next_step(self) -> list[Batch]:
        """The micro-batches of the next step; the last step of an epoch may be smaller."""
        order = self._epoch_order(self.state.epoch)
        chosen = self.last = self._take(order, self.state.cursor)
        self.state.cursor += len(chosen)
        if self.state.cursor >= len(order):
            self.state = LoaderState(self.state.epoch + 1, 0)
        groups = split_by_tokens([self.samples[i] for i in chosen], self.micro_batch_tokens)
        return [self.collate(group) for group in groups]

    def _take(self, order: list[int], cursor: int) -> list[int]:
        """The samples of the step that begins at `cursor`."""
        if self.batch_size is not None:
            return order[cursor : cursor + self.batch_size]
        assert self.batch_tokens is not None, "checked when the loader was made"
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
