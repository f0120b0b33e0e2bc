"""Rows of token shards: documents concatenated and split every `row_tokens`, each isolated.

documents  a a a a e | b b e | c c c c c c e        concatenated in the order of the epoch
rows       a a a a e   b b   e | c c c   c c c e    (of 8 tokens; a split document continues in the
                                                    next row)
lengths    5           2   | 1   3 ...              (each part is a separate sequence, positions
                                                    count from 0)
labels     a a a e -   b e   - | ...                the next token of the same document, even if it
                                                    is in the next row

Any row can be located from the document lengths alone, without reading the others, so the position
of a run is just two integers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from easyllm.batches.loader import LoaderState, StepSize, with_fillers
from easyllm.batches.packing import Batch
from easyllm.core.errors import ConfigError, DataError
from easyllm.corpus.shards import TokenShards
from easyllm.corpus.token_bytes import token_bytes
from easyllm.ops.cross_entropy import IGNORE_INDEX
from easyllm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from easyllm.batches.rank_share import RankShare

Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Row:
    """Parts of documents: token ids and labels [n] int64, and the length of each part."""

    token_ids: Numbers
    labels: Numbers
    lengths: Numbers


class Rows:
    """Documents concatenated in a given order and split into rows.

    Args:
        shards: the documents; the tokens of a row are read when the row is requested.
        row_tokens: tokens per row; the last row may be shorter.
        order: document numbers; by default all documents in stored order.
        max_tokens: maximum number of tokens in all rows; None for no limit.
    """

    def __init__(
        self,
        shards: TokenShards,
        row_tokens: int,
        *,
        order: Numbers | None = None,
        max_tokens: int | None = None,
    ) -> None:
        self.shards, self.row_tokens = shards, row_tokens
        self._order = np.arange(len(shards)) if order is None else order
        self._ends = np.cumsum(shards.lengths()[self._order])
        total = int(self._ends[-1]) if len(self._ends) else 0
        self.num_tokens = total if max_tokens is None else min(total, max_tokens)

    def __len__(self) -> int:
        return -(-self.num_tokens // self.row_tokens)

    def row(self, number: int) -> Row:
        """Reads row `number` from the shards."""
        start = number * self.row_tokens
        stop = min(start + self.row_tokens, self.num_tokens)
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._ends, stop, side="left"))
        parts = self.shards.documents(self._order[first : last + 1])
        left_over = int(self._ends[last]) - stop  # tokens of the last document after this row
        begun = start - (int(self._ends[first]) - len(parts[0]))  # of the first one before this row
        parts[0] = parts[0][begun:]
        if left_over:
            parts[-1] = parts[-1][: len(parts[-1]) - left_over + 1]  # plus one for the last label
        ids = np.concatenate(parts, dtype=np.int64)
        ends = np.append(self._ends[first:last], stop) - start
        size = stop - start
        labels = np.full(size, IGNORE_INDEX)
        labels[: len(ids) - 1] = ids[1:]
        labels[ends[:-1] - 1] = IGNORE_INDEX
        lengths = np.diff(ends, prepend=0)
        return Row(ids[:size], labels, lengths[lengths > 0])


class ShardLoader:
    """Yields the micro-batches of one optimizer step after another, without end.

    An epoch contains every token once. Documents are shuffled with the seed and split into rows,
    and then the rows are shuffled as well; otherwise all rows of a long document would fall into
    the same few steps.

    Args:
        row_tokens: tokens per row.
        batch_size: rows per step; None if `batch_tokens` gives the step size.
        batch_tokens: minimum number of tokens per step.
        micro_batch_tokens: maximum number of tokens in one packed micro-batch of complete rows; a
            longer row forms its own micro-batch.
        seed: seed of the order, which is different in each epoch; None keeps the order of the
            shards.

    Raises:
        ConfigError: not exactly one of `batch_size` and `batch_tokens` is given.
        DataError: the shards are empty.
    """

    def __init__(
        self,
        shards: TokenShards,
        *,
        row_tokens: int,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        micro_batch_tokens: int,
        seed: int | None,
    ) -> None:
        if (batch_size is None) == (batch_tokens is None):
            raise ConfigError(
                f"got batch_size={batch_size} and batch_tokens={batch_tokens}, but exactly one "
                "sets the step size; give one of them"
            )
        _check_not_empty(shards)
        self.shards, self.row_tokens, self.seed = shards, row_tokens, seed
        self.rows_per_step = batch_size or -(-(batch_tokens or 1) // row_tokens)
        self.rows_per_batch = max(1, micro_batch_tokens // row_tokens)
        self.state = LoaderState()
        self.last: list[int] = []
        self.figures: Mapping[str, float] = {}
        """Row numbers of the most recent step."""
        self.share: RankShare | None = None
        """This rank's share of every step, if a run is divided among ranks."""
        self._epoch: tuple[int, Rows, Numbers] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps per epoch."""
        rows = -(-self.shards.manifest.tokens // self.row_tokens)
        return -(-rows // self.rows_per_step)

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            yield self.next_step()

    def next_step(self) -> list[Batch]:
        """Returns the micro-batches of the next step; the last step of an epoch may be smaller."""
        rows, order = self._rows_of(self.state.epoch)
        cursor = self.state.cursor
        self.last = order[cursor : cursor + self.rows_per_step].tolist()
        self.state.cursor += len(self.last)
        if self.state.cursor >= len(order):
            self.state = LoaderState(self.state.epoch + 1, 0)
        if self.share is None:
            return _batches(rows, self.last, self.rows_per_batch)
        sizes = [self.row_tokens] * len(self.last)
        most = self.rows_per_batch * self.row_tokens
        groups, fillers = self.share.groups(sizes, most)
        batches = [_batch([rows.row(self.last[n]) for n in group]) for group in groups]
        return with_fillers(batches, fillers)

    def largest_step(self, steps: int) -> StepSize:  # noqa: ARG002 - rows have one size
        """Returns a bound: the tokens of a micro-batch, all of them with a loss."""
        rows = min(self.rows_per_step, -(-self.shards.manifest.tokens // self.row_tokens))
        longest = min(self.row_tokens, self.shards.manifest.tokens)
        tokens = min(rows, self.rows_per_batch) * longest
        return StepSize(
            tokens=tokens,
            trained=tokens,
            longest=longest,
            micro_batches=-(-rows // self.rows_per_batch),
        )

    def _rows_of(self, epoch: int) -> tuple[Rows, Numbers]:
        """Returns the rows of the epoch, and their order."""
        if self._epoch is None or self._epoch[0] != epoch:
            if self.seed is None:
                rows = Rows(self.shards, self.row_tokens)
                order = np.arange(len(rows))
            else:
                generator = np.random.default_rng([self.seed, epoch])
                documents = generator.permutation(len(self.shards))
                rows = Rows(self.shards, self.row_tokens, order=documents)
                order = generator.permutation(len(rows))
            self._epoch = (epoch, rows, order)
        return self._epoch[1:]


@dataclass(frozen=True, slots=True)
class Validation:
    """Validation batches, and the number of text bytes that their labels represent.

    bits per byte = summed loss in nats / ln 2 / num_bytes
    """

    batches: list[Batch]
    num_bytes: int


def validation_batches(
    shards: TokenShards,
    tokenizer: Tokenizer,
    *,
    row_tokens: int,
    max_tokens: int,
    micro_batch_tokens: int,
) -> Validation:
    """Builds batches of the first `max_tokens` tokens of the shards, in a fixed order.

    The first token of a document is not predicted, so its bytes are not counted. An end-of-document
    token is predicted, but has no bytes.

    Args:
        tokenizer: gives the number of text bytes of each token.
        row_tokens: tokens per row.
        max_tokens: number of tokens to use.
        micro_batch_tokens: maximum number of tokens in one packed batch.

    Raises:
        DataError: the shards are empty.
    """
    _check_not_empty(shards)
    rows = Rows(shards, row_tokens, max_tokens=max_tokens)
    batches = _batches(rows, range(len(rows)), max(1, micro_batch_tokens // row_tokens))
    sizes = torch.from_numpy(token_bytes(tokenizer))
    labels = torch.cat([batch.labels for batch in batches])
    return Validation(batches, int(sizes[labels[labels != IGNORE_INDEX]].sum()))


def _batches(rows: Rows, numbers: Sequence[int], rows_per_batch: int) -> list[Batch]:
    starts = range(0, len(numbers), rows_per_batch)
    return [_batch([rows.row(n) for n in numbers[s : s + rows_per_batch]]) for s in starts]


def _batch(rows: list[Row]) -> Batch:
    """Packs rows into one batch."""
    labels = np.concatenate([row.labels for row in rows])
    lengths = np.concatenate([row.lengths for row in rows])
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
    return Batch(
        token_ids=torch.from_numpy(np.concatenate([row.token_ids for row in rows])),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        lengths=tuple(lengths.tolist()),
        num_trained=int((labels != IGNORE_INDEX).sum()),
    )


def _check_not_empty(shards: TokenShards) -> None:
    if shards.manifest.tokens == 0:
        raise DataError(f"the shards in {str(shards.folder)!r} contain no tokens; rebuild them")
