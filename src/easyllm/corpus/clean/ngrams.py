"""Counts characters in repeated word n-grams, exactly: without hashing, so without collisions.

An (n+1)-gram is repeated only if the n-gram at its start and the n-gram one word later are both
repeated. The number of candidate positions therefore shrinks with each order; for ordinary text,
few remain after order three or four.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from easyllm.corpus.clean.scripts import is_unspaced

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RepeatedNgrams:
    """The n-grams of one order that occur more than once.

    Attributes:
        order: n.
        starts: [O] index of the first word of each occurrence, ascending.
        labels: [O] label of the n-gram of each occurrence; equal n-grams have equal labels.
    """

    order: int
    starts: Ints
    labels: Ints


class NgramStatistics:
    """Repetition statistics of a sequence of words, by n-gram order.

    >>> statistics = NgramStatistics("to be or not to be".split())
    >>> statistics.top_characters(2), statistics.duplicate_characters(2)
    (10, 4)
    """

    def __init__(self, words: list[str]) -> None:
        self._words = words
        self._orders = self._walk()
        self._found: list[RepeatedNgrams] = []

    def top_characters(self, order: int) -> int:
        """Returns the length of the most frequent n-gram times its number of occurrences.

        The length is that of the words joined as they are written. Ties go to the earliest n-gram.
        Returns 0 if there are fewer than n words.
        """
        if len(self._words) < order:
            return 0
        found = self.repeated(order)
        start, count = 0, 1
        if len(found.starts):
            occurrences = np.bincount(found.labels)[found.labels]
            first = int(occurrences.argmax())
            start, count = int(found.starts[first]), int(occurrences[first])
        return written_length(self._words[start : start + order]) * count

    def duplicate_characters(self, order: int) -> int:
        """Returns the number of characters in n-grams seen before, counting each character once.

        Scans from the left: an n-gram seen before is counted and the scan skips all of it; any
        other n-gram is marked as seen and the scan moves on by one word.
        """
        found = self.repeated(order)
        seen: set[int] = set()
        total = free_from = 0
        for start, label in zip(found.starts.tolist(), found.labels.tolist(), strict=True):
            if start < free_from:
                continue
            if label in seen:
                total += int(self._offsets[start + order] - self._offsets[start])
                free_from = start + order
            else:
                seen.add(label)
        return total

    def repeated(self, order: int) -> RepeatedNgrams:
        """Returns the n-grams of this order that occur more than once.

        All lower orders are computed first; results are cached.
        """
        while len(self._found) < order:
            self._found.append(next(self._orders))
        return self._found[order - 1]

    @cached_property
    def _offsets(self) -> Ints:
        """[W + 1] number of characters before each word, and in total."""
        lengths = np.fromiter(map(len, self._words), np.int64, len(self._words))
        return np.concatenate(([0], lengths.cumsum()))

    def _walk(self) -> Iterator[RepeatedNgrams]:
        """Yields the repeated n-grams of order 1, 2, 3, … indefinitely."""
        index = {word: number for number, word in enumerate(dict.fromkeys(self._words))}
        ids = np.fromiter(map(index.__getitem__, self._words), np.int64, len(self._words))
        starts, labels = _occurring_twice(np.arange(len(ids)), ids, np.bincount(ids, minlength=1))
        order = 1
        while True:
            yield RepeatedNgrams(order, starts, labels)
            if len(starts):
                followed = starts[1:] == starts[:-1] + 1
                starts = starts[:-1][followed]
                pairs = labels[:-1][followed] * len(index) + ids[starts + order]
                starts, labels = _occurring_twice(starts, *_dense_labels(pairs))
            order += 1


def written_length(words: list[str]) -> int:
    """Returns the number of characters of words joined as they are written.

    There is a space between words, except next to scripts that are written without spaces.

    >>> written_length(["to", "be"]), written_length(["不", "贵", "。"])
    (5, 3)
    >>> written_length(["用", "GPU", "s"])
    6
    """
    text = " ".join(words)
    if text.isascii():
        return len(text)
    unspaced = [is_unspaced(word) for word in words]
    return len(text) - sum(a or b for a, b in pairwise(unspaced))


def _dense_labels(keys: Ints) -> tuple[Ints, Ints]:
    """Returns a label 0, 1, … for each key, equal for equal keys, and the count of each label."""
    if not len(keys):
        return keys, keys
    order = keys.argsort()
    ascending = keys[order]
    ranks = np.zeros(len(keys), np.int64)
    np.not_equal(ascending[1:], ascending[:-1]).cumsum(out=ranks[1:])
    labels = np.empty_like(ranks)
    labels[order] = ranks
    return labels, np.bincount(ranks)


def _occurring_twice(starts: Ints, labels: Ints, counts: Ints) -> tuple[Ints, Ints]:
    if len(counts) == len(labels):  # all different
        return starts[:0], labels[:0]
    is_repeated = counts[labels] > 1
    return starts[is_repeated], labels[is_repeated]
