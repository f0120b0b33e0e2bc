"""Pool of the tokenized documents of one source, for sampling and for held-out validation data."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from easyllm.core.json_types import Json
from easyllm.corpus.shards import token_dtype
from easyllm.corpus.token_bytes import token_bytes
from easyllm.tokenizer.tokenizer import Tokenizer


class TokenPool:
    """The tokenized documents of one source, over all its splits.

    Args:
        stems: path stem of each split; `.bin` has the token ids, `.npz` the `lengths` and `bytes`
            of the documents.
        tokenizer: the tokenizer that produced the ids.

    Attributes:
        lengths: [n] int64, number of tokens of every document.
        bytes: [n] int64, number of UTF-8 bytes of its text.
        numbers: indices of the documents that may be sampled.
    """

    def __init__(self, stems: Sequence[Path], tokenizer: Tokenizer) -> None:
        dtype = token_dtype(tokenizer.vocab_size)
        tables = [np.load(f"{stem}.npz", allow_pickle=False) for stem in stems]
        self.lengths = np.concatenate([table["lengths"] for table in tables])
        self.bytes = np.concatenate([table["bytes"] for table in tables])
        self.numbers = np.arange(len(self.lengths))
        self._first = np.cumsum([0, *(len(table["lengths"]) for table in tables)])
        self._starts = [np.cumsum([0, *table["lengths"]]) for table in tables]
        self._tokenizer = tokenizer
        self._tokens = [
            np.memmap(f"{stem}.bin", dtype=dtype, mode="r") if starts[-1] else np.empty(0, dtype)
            for stem, starts in zip(stems, self._starts, strict=True)
        ]

    @property
    def tokens(self) -> int:
        """The number of tokens of the documents that may be sampled."""
        return int(self.lengths[self.numbers].sum())

    def hold_out(self, share: float, generator: np.random.Generator) -> NDArray[np.int64]:
        """Holds out random documents, which are then excluded from sampling.

        At least one document is held out if `share` is positive, but never all. Of a single
        document, the tail is held out.

        Args:
            share: fraction of the documents.
            generator: chooses the documents.

        Returns:
            The indices of the held-out documents, ascending.
        """
        if share and len(self.lengths) == 1:
            return self.hold_out_tail(share)
        order = generator.permutation(len(self.lengths))
        count = max(0, min(len(order) - 1, int(np.ceil(share * len(order)))))
        self.numbers = np.sort(order[count:])
        return np.sort(order[:count])

    def hold_out_tail(self, share: float) -> NDArray[np.int64]:
        """Holds out the last tokens, splitting the document that contains the boundary in two.

        Args:
            share: fraction of the tokens.

        Returns:
            The indices of the held-out documents, ascending.
        """
        ends = np.cumsum(self.lengths)
        if not len(ends) or not ends[-1]:
            return np.empty(0, dtype=np.int64)
        begin = int(ends[-1] * (1 - share))
        number = int(np.searchsorted(ends, begin, side="right"))
        inside = begin - int(ends[number] - self.lengths[number])
        if inside:
            self._cut(number, inside)
            number += 1
        self.numbers = np.arange(number)
        return np.arange(number, len(self.lengths))

    def _cut(self, number: int, inside: int) -> None:
        """Splits a document in two: its first `inside` tokens, and the rest."""
        sizes = token_bytes(self._tokenizer)
        head_bytes = int(sizes[self.document(number)[:inside]].sum())
        for values, head in ((self.lengths, inside), (self.bytes, head_bytes)):
            values[number] -= head
        self.lengths = np.insert(self.lengths, number, inside)
        self.bytes = np.insert(self.bytes, number, head_bytes)
        split = int(np.searchsorted(self._first, number, side="right")) - 1
        place = number - int(self._first[split])
        starts = self._starts[split]
        self._starts[split] = np.insert(starts, place + 1, starts[place] + inside)
        self._first[split + 1 :] += 1

    def document(self, number: int) -> Json:
        """Returns the token ids of document `number`, a view of the memory-mapped file."""
        split = int(np.searchsorted(self._first, number, side="right")) - 1
        begin, end = self._starts[split][number - self._first[split] :][:2]
        return self._tokens[split][begin:end]
