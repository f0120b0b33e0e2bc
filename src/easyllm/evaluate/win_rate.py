"""Win rate of a model against a reference on the same prompts.

    win rate = (wins + ties / 2) / pairs          standard error = sd of {1, ½, 0} / √pairs

0.5 means that neither is better. Pairs without a parsed verdict are left out and counted.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from easyllm.core.errors import DataError
from easyllm.core.json_types import JsonObject
from easyllm.evaluate.comparisons import (
    Comparer,
    Comparison,
    Judged,
    PositionBias,
    position_bias,
)
from easyllm.evaluate.sampled_answers import SampledAnswer


@dataclass(frozen=True, slots=True, kw_only=True)
class WinRate:
    """Result of a comparison of two models.

    Attributes:
        wins, ties, losses: number of pairs, from the side of the first model.
        unparsed: number of pairs without a parsed verdict.
        identical: number of ties because both answers are the same; they are not sent to the judge.
        win_rate: wins plus half the ties, divided by the pairs with a verdict.
        standard_error: of the win rate.
        truncated: number of answers of both models that reached the maximum length.
        mean_tokens: mean length of the answers of both models, in tokens; judges prefer long ones.
        bias: how much the judge depends on the order of the answers; None if it does not see one.
        comparisons, judged: the pairs and the decisions, in the order of the prompts.
    """

    wins: int
    ties: int
    losses: int
    unparsed: int
    identical: int
    win_rate: float
    standard_error: float
    truncated: int
    mean_tokens: tuple[float, float]
    bias: PositionBias | None
    comparisons: tuple[Comparison, ...]
    judged: tuple[Judged, ...]

    def as_dict(self) -> JsonObject:
        """Returns the figures as a dict, without the pairs."""
        score: JsonObject = {
            "name": "win_rate",
            "value": self.win_rate,
            "standard_error": self.standard_error,
            "n": self.wins + self.ties + self.losses,
            "unparsed": self.unparsed,
            "truncated": self.truncated,
        }
        return {
            "scores": [score],
            "wins": self.wins,
            "ties": self.ties,
            "losses": self.losses,
            "identical": self.identical,
            "mean_tokens": list(self.mean_tokens),
            "position_bias": None if self.bias is None else asdict(self.bias),
        }


def win_rate(
    ours: Sequence[SampledAnswer], theirs: Sequence[SampledAnswer], comparer: Comparer
) -> WinRate:
    """Returns how often the answers `ours` are better than `theirs`.

    Args:
        ours, theirs: answers of two models to the same prompts, in the same order.
        comparer: decides which of two answers is better.

    Raises:
        DataError: no pair has a parsed verdict, or a score is not finite.
        JudgeError: a judge cannot be reached.
    """
    pairs = tuple(Comparison(one, two) for one, two in zip(ours, theirs, strict=True))
    different = [pair for pair in pairs if pair.first.text != pair.second.text]
    decided = iter(comparer.compare(different) if different else ())
    judged = tuple(
        next(decided) if pair.first.text != pair.second.text else Judged("tie") for pair in pairs
    )
    points = {"first": 1.0, "tie": 0.5, "second": 0.0}
    scores = [points[each.winner] for each in judged if each.winner is not None]
    if not scores:
        raise DataError(
            f"none of the {len(pairs)} pairs has a parsed verdict; check that the judge can follow "
            "its instructions, or raise --judge-max-tokens"
        )
    mean = sum(scores) / len(scores)
    spread = sum((score - mean) ** 2 for score in scores) / max(1, len(scores) - 1)
    lengths = [sum(answer.num_tokens for answer in side) / len(side) for side in (ours, theirs)]
    return WinRate(
        wins=scores.count(1.0),
        ties=scores.count(0.5),
        losses=scores.count(0.0),
        unparsed=len(judged) - len(scores),
        identical=len(pairs) - len(different),
        win_rate=mean,
        standard_error=math.sqrt(spread / len(scores)),
        truncated=sum(answer.truncated for answer in (*ours, *theirs)),
        mean_tokens=(lengths[0], lengths[1]),
        bias=position_bias(judged),
        comparisons=pairs,
        judged=judged,
    )


def judged_lines(result: WinRate, first: str, second: str) -> str:
    """Returns the pairs as lines of JSON, which `easyllm eval --task elo` reads.

    Args:
        result: the comparison.
        first, second: names of the models.
    """
    winners = {"first": "a", "second": "b", "tie": "tie", None: None}
    lines = []
    for pair, decision in zip(result.comparisons, result.judged, strict=True):
        row = {
            "prompt": pair.first.prompt.messages,
            "a": first,
            "b": second,
            "winner": winners[decision.winner],
            "answer_a": pair.first.text,
            "answer_b": pair.second.text,
            "verdicts": [decision.in_order, decision.swapped],
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines)


__all__ = ["WinRate", "judged_lines", "win_rate"]
