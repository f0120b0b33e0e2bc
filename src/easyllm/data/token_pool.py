"""Tokenized documents of one source, out of which a mixture chooses and some are held out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from easyllm.data.shards import token_dtype
from easyllm.data.token_bytes import token_bytes
from easyllm.tokenizer.tokenizer import Tokenizer


class TokenPool:
    """The tokenized documents of one source, over all its splits.

    Args:
        stems: of each split its ids (`.bin`), and the lengths and bytes of its documents (`.npz`).
        tokenizer: the one that made the ids.

    Attributes:
        lengths: ids of every document.
        bytes: of their texts.
        numbers: documents that may be chosen.
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
        """Tokens of the documents that may be chosen."""
        return int(self.lengths[self.numbers].sum())

    def hold_out(self, share: float, generator: np.random.Generator) -> NDArray[np.int64]:
        """Takes documents out of those that may be chosen: at least one where a share is asked for, and never all. Of a single
        document, its tail."""
        if share and len(self.lengths) == 1:
            return self.hold_out_tail(share)
        order = generator.permutation(len(self.lengths))
        count = max(0, min(len(order) - 1, int(np.ceil(share * len(order)))))
        self.numbers = np.sort(order[count:])
        return np.sort(order[:count])

    def hold_out_tail(self, share: float) -> NDArray[np.int64]:
        """Takes the last tokens out of those that may be chosen; where they begin, the document is cut in two."""
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
        """Makes two documents of one: its first `inside` ids, and the rest."""
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

    def document(self, number: int) -> Any:
        """Its ids."""
        split = int(np.searchsorted(self._first, number, side="right")) - 1
        begin, end = self._starts[split][number - self._first[split] :][:2]
        return self._tokens[split][begin:end]
