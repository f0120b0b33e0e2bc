"""Scores of answers: a trained reward model, or a rule.

reward:FOLDER    a model with a head of one output (`objective.kind: reward`), or its adapter
rule:NAME        exact, contains, length, digits
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from easyllm.batches.packing import pack, split_by_tokens
from easyllm.core.device import pick_device
from easyllm.core.errors import ConfigError, DataError
from easyllm.evaluate.comparisons import Comparison, Judged
from easyllm.evaluate.sampled_answers import SampledAnswer
from easyllm.examples.prepare import encode_messages
from easyllm.examples.sample import Sample
from easyllm.models import load_tokenizer
from easyllm.models.adapted import load_adapted, split_adapter
from easyllm.nn.decoder import Decoder
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.train.objectives.reward import read_at_end, sequence_rewards

Scorer: TypeAlias = Callable[[Sequence[SampledAnswer]], list[float]]
"""Maps answers to scores, higher is better."""
BATCH_TOKENS = 4096


def finite(name: str, scorer: Scorer) -> Scorer:
    """Returns a scorer that refuses scores that are NaN or infinite."""

    def checked(answers: Sequence[SampledAnswer]) -> list[float]:
        scores = [float(score) for score in scorer(answers)]
        for answer, score in zip(answers, scores, strict=True):
            if not math.isfinite(score):
                shown = answer.text if len(answer.text) <= 100 else answer.text[:100] + "…"
                raise DataError(
                    f"{name} gave the score {score} to the answer {shown!r} "
                    f"({answer.prompt.location}), expected a finite number; check the model or rule"
                )
        return scores

    return checked


def reward_model_scorer(source: str) -> Scorer:
    """Returns the scorer of a reward model, which is loaded in fp32.

    Prompt and answer are rendered by the reward model's own chat template, so that it may have
    another tokenizer than the model that answers. A sequence longer than its context is truncated
    at the end.

    Raises:
        ConfigError: the model has not one output.
        SourceError, CheckpointError: the model cannot be loaded.
    """
    device = pick_device("auto")
    model = load_adapted(source, dtype="float32", device=device.type)
    if model.config.num_labels != 1:
        outputs = model.config.num_labels
        has = "no head for scores" if not outputs else f"a head of {outputs} outputs"
        raise ConfigError(
            f"{source!r} has {has}, expected one output; train a reward model with "
            "objective.kind=reward (easyllm train rm-en)"
        )
    return model_scorer(model, load_tokenizer(split_adapter(source)[0]))


def model_scorer(model: Decoder, tokenizer: Tokenizer) -> Scorer:
    """Returns the scorer of a reward model that is already loaded."""

    @torch.no_grad()
    def scores(answers: Sequence[SampledAnswer]) -> list[float]:
        samples = [_sample(answer, tokenizer, model.config.max_seq_len) for answer in answers]
        found: list[float] = []
        for group in split_by_tokens(samples, BATCH_TOKENS):
            batch = pack(group).to(model.device)
            found += sequence_rewards(model, batch).float().tolist()[: len(group)]
        return found

    return scores


def _sample(answer: SampledAnswer, tokenizer: Tokenizer, max_seq_len: int) -> Sample:
    messages = [*answer.prompt.messages, {"role": "assistant", "content": answer.text}]
    encoded = encode_messages(
        messages,
        answer.prompt.tools,
        answer.prompt.location,
        tokenizer,
        num_prompt=len(messages) - 1,
    ).cut(max_seq_len)
    if not any(encoded.mask):
        raise DataError(
            f"{answer.prompt.location}: the prompt fills the {max_seq_len} tokens that the reward "
            "model reads; leave the row out"
        )
    return read_at_end(encoded)


class ScoreComparer:
    """Prefers the answer with the higher score; equal scores are a tie."""

    def __init__(self, name: str, scorer: Scorer) -> None:
        self.name, self.scorer = name, scorer

    def compare(self, comparisons: Sequence[Comparison]) -> list[Judged]:
        """Returns the decision about each pair."""
        scores = self.scorer(
            [answer for pair in comparisons for answer in (pair.first, pair.second)]
        )
        decisions = []
        for one, two in zip(scores[::2], scores[1::2], strict=True):
            decisions.append(Judged("tie" if one == two else "first" if one > two else "second"))
        return decisions


__all__ = [
    "ScoreComparer",
    "Scorer",
    "finite",
    "model_scorer",
    "reward_model_scorer",
]
