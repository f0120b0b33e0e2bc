"""Divides the sequences of a step among data-parallel ranks, balanced by tokens.

Every rank reads the same step and takes its own share, so that the order of the data, and what a
checkpoint stores of it, do not depend on the number of ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from easyllm.batches.packing import split_by_tokens


@dataclass(frozen=True, slots=True)
class RankShare:
    """A rank's share of every step.

    Attributes:
        rank, size: number of the rank, and number of ranks.
    """

    rank: int
    size: int

    def groups(self, sizes: Sequence[int], max_tokens: int) -> tuple[list[list[int]], int]:
        """Returns this rank's micro-batches, as lists of sequence numbers.

        All ranks get the same number of micro-batches, because they meet in collectives in each.
        A rank with fewer sequences than that splits its micro-batches further; if it runs out of
        sequences, its last micro-batch is a filler, repeated as often as needed: the shortest
        sequence of the step, which counts for nothing.

        Args:
            sizes: number of tokens of each sequence of the step.
            max_tokens: maximum number of tokens of a micro-batch.

        Returns:
            The micro-batches, fillers last, and how many of them are fillers.
        """
        shares = balanced(sizes, self.size)
        groups = [_split(share, sizes, max_tokens) for share in shares]
        count = max(len(each) for each in groups)
        mine = groups[self.rank]
        while len(mine) < count:
            widest = max(range(len(mine)), key=lambda n: len(mine[n]), default=None)
            if widest is None or len(mine[widest]) < 2:
                break
            group = mine[widest]
            half = len(group) // 2
            mine[widest : widest + 1] = [group[:half], group[half:]]
        shortest = min(range(len(sizes)), key=lambda n: sizes[n])
        fillers = count - len(mine)
        return [*mine, *([shortest] for _ in range(fillers))], fillers


def balanced(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Divides numbered items among parts with nearly equal sums.

    The largest remaining item goes to the part with the smallest sum (Graham 1969); within a part,
    items keep their order.

    >>> balanced([5, 4, 3, 3, 3], 2)
    [[0, 3], [1, 2, 4]]
    """
    found: list[list[int]] = [[] for _ in range(parts)]
    sums = [0] * parts
    for number in sorted(range(len(sizes)), key=lambda n: (-sizes[n], n)):
        part = min(range(parts), key=lambda p: (sums[p], p))
        found[part].append(number)
        sums[part] += sizes[number]
    return [sorted(part) for part in found]


@dataclass(frozen=True, slots=True)
class Ranks:
    """The data-parallel ranks of a run, for an objective whose loss depends on a whole step.

    Attributes:
        rank, size: number of this rank, and number of ranks.
        gather: returns a small value of every rank, in the order of ranks; all must call it.
    """

    rank: int
    size: int
    gather: Callable[[Any], list[Any]]

    def part(self, count: int) -> slice:
        """Returns this rank's part of `count` items; the parts of all ranks follow each other.

        >>> [Ranks(rank, 2, list).part(5) for rank in range(2)]
        [slice(0, 2, None), slice(2, 5, None)]
        """
        start, stop = (count * n // self.size for n in (self.rank, self.rank + 1))
        return slice(start, stop)

    def gather_items(self, mine: Sequence[Any]) -> list[Any]:
        """Returns the items of all ranks, one after another."""
        return [item for items in self.gather(list(mine)) for item in items]


@dataclass(frozen=True, slots=True)
class _Numbered:
    number: int
    num_tokens: int


def _split(share: Sequence[int], sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    items = [_Numbered(number, sizes[number]) for number in share]
    return [[item.number for item in group] for group in split_by_tokens(items, max_tokens)]


__all__ = ["RankShare", "Ranks", "balanced"]
