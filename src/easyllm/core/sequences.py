"""Comparison of sequences of characters, token ids or messages."""

from collections.abc import Iterable


def num_equal(first: Iterable[object], second: Iterable[object]) -> int:
    """Returns the length of the common prefix of two sequences.

    >>> num_equal("tokens", "token ids")
    5
    """
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count
