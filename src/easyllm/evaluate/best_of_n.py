"""Best-of-n: the best of several answers as rows to fine-tune on, or the best and worst as pairs.

Rejection sampling fine-tuning trains on the best answer of each prompt (Llama 2, arXiv 2307.09288,
section 3.2.3); best and worst make pairs for DPO and reward models.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from easyllm.core.json_types import JsonObject
from easyllm.evaluate.sampled_answers import SampledAnswer
from easyllm.evaluate.scorers import Scorer

RowForm = Literal["sft", "pairs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BestOfN:
    """Rows of the best answers.

    Attributes:
        rows: rows of `messages` with one trained response, or of `prompt`, `chosen`, `rejected`.
        prompts: number of prompts.
        answers: number of answers.
        mean_score: mean score of all answers.
        best_score: mean score of each prompt's best answer.
        equal: number of prompts left out of the pairs, because all scores are equal or both answers
            have the same text.
        truncated: number of answers that reached the maximum length.
    """

    rows: list[JsonObject]
    prompts: int
    answers: int
    mean_score: float
    best_score: float
    equal: int
    truncated: int

    def as_dict(self) -> JsonObject:
        """Returns the figures as a dict; `rows` is their number."""
        return {**asdict(self), "rows": len(self.rows)}


def best_of_n(
    groups: Sequence[Sequence[SampledAnswer]], scorer: Scorer, *, form: RowForm
) -> BestOfN:
    """Returns the best answer of each prompt; of equal scores, the first.

    Args:
        groups: the answers to each prompt.
        scorer: their scores.
        form: `sft` for conversations, `pairs` for preference pairs of the best and the worst.

    Raises:
        DataError: a score is not finite.
    """
    flat = [answer for group in groups for answer in group]
    scores = iter(scorer(flat))
    rows, equal, total, best_total = [], 0, 0.0, 0.0
    for group in groups:
        own = [next(scores) for _ in group]
        total, best_total = total + sum(own), best_total + max(own)
        best, worst = group[own.index(max(own))], group[own.index(min(own))]
        if form == "sft":
            rows.append(_conversation(best))
        elif max(own) == min(own) or best.text == worst.text:
            equal += 1
        else:
            rows.append(_pair(best, worst))
    return BestOfN(
        rows=rows,
        prompts=len(groups),
        answers=len(flat),
        mean_score=total / max(1, len(flat)),
        best_score=best_total / max(1, len(groups)),
        equal=equal,
        truncated=sum(answer.truncated for answer in flat),
    )


def _conversation(answer: SampledAnswer) -> JsonObject:
    """Returns a row of messages in which only the answer is trained."""
    prompt = answer.prompt
    asked = [m | {"weight": 0} if m["role"] == "assistant" else m for m in prompt.messages]
    row: JsonObject = {"messages": [*asked, {"role": "assistant", "content": answer.text}]}
    return row if prompt.tools is None else row | {"tools": prompt.tools}


def _pair(best: SampledAnswer, worst: SampledAnswer) -> JsonObject:
    chosen, rejected = ([{"role": "assistant", "content": a.text}] for a in (best, worst))
    row: JsonObject = {"prompt": best.prompt.messages, "chosen": chosen, "rejected": rejected}
    return row if best.prompt.tools is None else row | {"tools": best.prompt.tools}


__all__ = ["BestOfN", "RowForm", "best_of_n"]
