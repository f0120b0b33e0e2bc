"""What is learned from: answers with their rewards, as samples with one number per token.

token_ids   p p p a a a      a prompt and its answer, without the last token
labels      - - a a a e      the answer's tokens, each at the position that predicts it
extras      0 0 x x x x      advantages, log-probabilities ... at the labelled positions
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from easyllm.batches.shared_prompts import ANSWERS, PROMPT
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.examples.sample import Sample
from easyllm.ops.cross_entropy import IGNORE_INDEX
from easyllm.rl.prompts import PromptSample
from easyllm.rl.rollout import RolledOut


@dataclass(slots=True)
class Experience:
    """One answer to a prompt, and everything that is known about it.

    Attributes:
        prompt: the prompt.
        answer: the answer.
        score: the sum of its rewards, less the penalties on its length.
        reward: the score, normalised and clipped; without any KL penalty.
        is_trained: whether its tokens have a loss.
        tokens: values per answer token, by name, each [length] fp32.
        group: number of its prompt within the rollout.
    """

    prompt: PromptSample
    answer: RolledOut
    score: float = 0.0
    reward: float = 0.0
    is_trained: bool = True
    tokens: dict[str, Tensor] = field(default_factory=dict)
    group: int = 0

    @property
    def length(self) -> int:
        """Number of answer tokens."""
        return len(self.answer.token_ids)

    @property
    def num_shared(self) -> int:
        """Number of tokens that all answers to the prompt have in common."""
        return len(self.prompt.token_ids)

    def sample(self) -> Sample:
        """Returns the answer as a sample whose labels are the answer's tokens."""
        ids = (*self.prompt.token_ids, *self.answer.token_ids)
        before = len(self.prompt.token_ids) - 1
        kept = self.tokens.get("kept")
        labels = list(self.answer.token_ids)
        if not self.is_trained:
            labels = [IGNORE_INDEX] * self.length
        elif kept is not None:
            each = zip(labels, kept.tolist(), strict=True)
            labels = [label if keeps else IGNORE_INDEX for label, keeps in each]
        extras = {
            name: [0.0] * before + values.tolist()
            for name, values in self.tokens.items()
            if name != "kept"
        }
        return Sample(ids[:-1], (*[IGNORE_INDEX] * before, *labels), extras)

    def scored_sample(self) -> Sample:
        """Returns the answer as a sample without extras, all of its tokens labelled."""
        before = len(self.prompt.token_ids) - 1
        ids = (*self.prompt.token_ids, *self.answer.token_ids)
        return Sample(ids[:-1], (*[IGNORE_INDEX] * before, *self.answer.token_ids))


def padded(experiences: Sequence[Experience], name: str) -> tuple[Tensor, Tensor]:
    """Returns values per token as [B, L], padded with 0 on the right, and the mask [B, L]."""
    widest = max(each.length for each in experiences)
    out = torch.zeros(len(experiences), widest)
    mask = torch.zeros(len(experiences), widest, dtype=torch.bool)
    for row, each in enumerate(experiences):
        out[row, : each.length] = each.tokens[name]
        mask[row, : each.length] = True
    return out, mask


def store(experiences: Sequence[Experience], name: str, values: Tensor) -> None:
    """Stores values [B, L], padded on the right, per token."""
    for row, each in enumerate(experiences):
        each.tokens[name] = values[row, : each.length].clone()


def with_groups(
    samples: Sequence[Sample], answers: "Sequence[Experience | Stored]"
) -> list[Sample]:
    """Returns the samples of a micro-batch with extras that say which ones share a prompt.

    Args:
        samples: adjacent answers of a prompt follow each other.
        answers: the answer that each sample is of.
    """
    found, start = list[Sample](), 0
    for _, adjacent in groupby(answers, key=lambda each: each.group):
        size = len(list(adjacent))
        for number in range(start, start + size):
            shared = {ANSWERS: size, PROMPT: answers[number].num_shared}
            sample = samples[number]
            found.append(Sample(sample.token_ids, sample.labels, {**sample.extras, **shared}))
        start += size
    return found


@dataclass(frozen=True, slots=True)
class Stored:
    """An answer of a rollout whose updates are not done, as checkpoints store it.

    Attributes:
        sample: the answer with everything that the loss needs.
        group: number of its prompt within the rollout.
        num_shared: number of tokens of its prompt.
    """

    sample: Sample
    group: int
    num_shared: int


def to_json(each: Experience) -> JsonObject:
    """Returns an answer as JSON values, exactly: fp32 numbers survive as decimal fractions."""
    sample = each.sample()
    return {
        "token_ids": list(sample.token_ids),
        "labels": list(sample.labels),
        "extras": {name: list(values) for name, values in sample.extras.items()},
        "group": each.group,
        "num_shared": each.num_shared,
    }


def from_json(values: JsonMapping) -> Stored:
    """Returns the answer that `to_json` described."""
    ids, labels, extras = values["token_ids"], values["labels"], values["extras"]
    assert isinstance(ids, list), "written by to_json"
    assert isinstance(labels, list), "written by to_json"
    assert isinstance(extras, dict), "written by to_json"
    sample = Sample(tuple(ids), tuple(labels), dict(extras))
    return Stored(sample, int(values["group"]), int(values["num_shared"]))


__all__ = ["Experience", "Stored", "from_json", "padded", "store", "to_json", "with_groups"]
