"""Pairs of answers to the same prompt, and what a judge decides about them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from easyllm.evaluate.elo import Winner
from easyllm.evaluate.judge_prompt import Letter
from easyllm.evaluate.sampled_answers import SampledAnswer

_IN_ORDER: dict[Letter, Winner] = {"A": "first", "B": "second", "tie": "tie"}
_SWAPPED: dict[Letter, Winner] = {"A": "second", "B": "first", "tie": "tie"}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two answers to one prompt."""

    first: SampledAnswer
    second: SampledAnswer


@dataclass(frozen=True, slots=True)
class Judged:
    """A decision about two answers.

    Attributes:
        winner: the better one; None if a verdict could not be parsed.
        in_order, swapped: the verdicts of an LLM judge that saw the first answer as A, and as B;
            None if unparsed, or if the judge does not depend on the order.
    """

    winner: Winner | None
    in_order: Letter | None = None
    swapped: Letter | None = None

    @classmethod
    def of_orders(cls, in_order: Letter | None, swapped: Letter | None) -> "Judged":
        """Returns the decision of two verdicts: their winner if they agree, else a tie."""
        if in_order is None or swapped is None:
            return cls(None, in_order, swapped)
        one, two = _IN_ORDER[in_order], _SWAPPED[swapped]
        return cls(one if one == two else "tie", in_order, swapped)


class Comparer(Protocol):
    """Decides which of two answers is better: an LLM judge, or a score."""

    name: str

    def compare(self, comparisons: Sequence[Comparison], /) -> list[Judged]:
        """Returns the decision about each pair."""


@dataclass(frozen=True, slots=True)
class PositionBias:
    """How much the verdicts of a judge depend on the order of the answers.

    Attributes:
        first_share: share of the verdicts for one of the answers that chose the one shown first;
            0.5 without a bias.
        disagreement: share of the pairs for which the two orders have different winners.
        pairs: number of pairs with both verdicts.
    """

    first_share: float
    disagreement: float
    pairs: int


def position_bias(judged: Sequence[Judged]) -> PositionBias | None:
    """Returns the position bias of a judge; None if no pair was judged in both orders."""
    both = [(j.in_order, j.swapped) for j in judged if j.in_order and j.swapped]
    if not both:
        return None
    decided = [letter for pair in both for letter in pair if letter != "tie"]
    agreeing = {("A", "B"), ("B", "A"), ("tie", "tie")}
    return PositionBias(
        first_share=decided.count("A") / len(decided) if decided else 0.5,
        disagreement=sum(pair not in agreeing for pair in both) / len(both),
        pairs=len(both),
    )


__all__ = ["Comparer", "Comparison", "Judged", "PositionBias", "position_bias"]
