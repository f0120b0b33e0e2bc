"""Exact-substring deduplication: removes runs of words that occurred before.

Source: Lee et al. 2021, arXiv 2107.06499. The paper builds a suffix array; here every window of
`min_words` words is hashed and the hashes are sorted. A repeated run of at least that many words is
the union of its repeated windows, so the result is the same, in O(N log N) time and about 50 bytes
per word, without compiled code. The first occurrence is kept.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from easyllm.corpus.dedup.config import SubstringConfig
from easyllm.corpus.dedup.ragged import Ragged
from easyllm.corpus.dedup.words import Windows, WordHasher, mix, word_spans


def word_hashes(texts: Iterable[str]) -> Ragged:
    """Returns the hashes of the words of each text."""
    hasher = WordHasher()
    return Ragged.from_rows([hasher.hashes(text) for text in texts])


def repeated_words(words: Ragged, config: SubstringConfig) -> NDArray[np.bool_]:
    """Returns [N] bool: whether each word is in a window of `min_words` words that occurred before.

    The earlier window is in this text or an earlier one and must not overlap the later window: if
    "ha" is repeated 200 times, `min_words` of them are kept. Windows never span two texts.
    """
    size, total = config.min_words, len(words.values)
    later = _later_windows(words, size)
    depth = np.zeros(total + 1, np.int32)
    depth[later] += 1
    depth[later + size] -= 1
    return np.cumsum(depth, out=depth)[:total] > 0


def _later_windows(words: Ragged, size: int) -> NDArray[np.int64]:
    """Returns the starts of windows that repeat an earlier, non-overlapping window."""
    windows = mix(Windows(words.values).hashes(size))
    ends = np.repeat(words.offsets[1:], words.lengths)[: len(windows)]
    places = np.flatnonzero(np.arange(size, len(windows) + size) <= ends)  # within one text
    windows = windows[places]
    del ends
    order = np.argsort(windows, kind="stable")
    is_same = windows[order[1:]] == windows[order[:-1]]
    repeats = np.flatnonzero(is_same) + 1  # in sorted order, equal to the previous window
    runs = np.flatnonzero(~np.concatenate([[False], is_same]))  # start of each run of equal windows
    first = runs[np.searchsorted(runs, repeats, side="right") - 1]
    later, earliest = places[order[repeats]], places[order[first]]
    return later[later - earliest >= size]


def without_words(text: str, drop: NDArray[np.bool_]) -> str:
    """Returns the text without the marked words and what follows each up to the next kept word.

    Args:
        text: the text.
        drop: [number of words] whether each is removed.
    """
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
