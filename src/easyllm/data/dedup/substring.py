"""Runs of words that occurred before, cut out of the later text (exact substrings, Lee et al. 2021, arXiv 2107.06499).

Where the paper builds a suffix array, every window of `min_words` words is hashed and sorted: a repeated run of at least
that many words is the union of its repeated windows, so the outcome is the same in O(N log N) time and about 50 bytes
a word, without a compiled part. The first occurrence stays.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from easyllm.data.dedup.config import SubstringConfig
from easyllm.data.dedup.ragged import Ragged
from easyllm.data.dedup.words import Windows, WordHasher, mix, word_spans


def word_hashes(texts: Iterable[str]) -> Ragged:
    """Of each text the hashes of its words."""
    hasher = WordHasher()
    return Ragged.from_rows([hasher.hashes(text) for text in texts])


def repeated_words(words: Ragged, config: SubstringConfig) -> NDArray[np.bool_]:
    """[N] which words lie in a window of `min_words` words that occurred before, in this text or an earlier one.

    The earlier window must be over when the later begins: of "ha" said 200 times, `min_words` stay.
    Windows never reach across two texts.
    """
    size, total = config.min_words, len(words.values)
    later = _later_windows(words, size)
    depth = np.zeros(total + 1, np.int32)
    depth[later] += 1
    depth[later + size] -= 1
    return np.cumsum(depth, out=depth)[:total] > 0


def _later_windows(words: Ragged, size: int) -> NDArray[np.int64]:
    """Where the windows begin that repeat one which is over by then."""
    windows = mix(Windows(words.values).hashes(size))
    ends = np.repeat(words.offsets[1:], words.lengths)[: len(windows)]
    places = np.flatnonzero(np.arange(size, len(windows) + size) <= ends)  # within one text
    windows = windows[places]
    del ends
    order = np.argsort(windows, kind="stable")
    is_same = windows[order[1:]] == windows[order[:-1]]
    repeats = np.flatnonzero(is_same) + 1  # in sorted order, equal to the one before
    runs = np.flatnonzero(~np.concatenate([[False], is_same]))  # where each run of equals begins
    first = runs[np.searchsorted(runs, repeats, side="right") - 1]
    later, earliest = places[order[repeats]], places[order[first]]
    return later[later - earliest >= size]


def without_words(text: str, drop: NDArray[np.bool_]) -> str:
    """The text without the words marked in `drop` (one mark a word) and what follows each up to the next kept word."""
    if not drop.any():
        return text
    if drop.all():
        return ""
    spans = word_spans(text)
    if len(spans) != len(drop):
        raise AssertionError(f"{len(drop)} marks for {len(spans)} words")
    kept, begin, gone = [], 0, False
    for (start, _), is_dropped in zip(spans, drop, strict=True):
        if is_dropped and not gone:
            kept.append(text[begin:start])
        elif gone and not is_dropped:
            begin = start
        gone = bool(is_dropped)
    return "".join(kept).rstrip() if gone else "".join([*kept, text[begin:]])
