"""Reward models: a language model with a head of one output, read at a response's last token.

    pairs     -log σ(r(chosen) - r(rejected) - m) + c (r(chosen) + r(rejected))²
    binary    -log σ(r) for a good response, -log σ(-r) for a bad one
    scores    (r - score)²

The first is the Bradley-Terry model with the pair's margin m, 0 if the data give none (Llama 2,
arXiv 2307.09288, eq. 2), and a term that centres the rewards (arXiv 2312.09244).
The kind of data decides which. A ranking of K responses becomes its pairs, which stay in one batch
and whose loss is their mean (Ouyang et al. 2022, arXiv 2203.02155, eq. 1).
The last token is the end-of-turn token: what templates write after it is not an input, so that a
response that was just generated is read at the same place.
"""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat
from torch import Tensor
from torch.nn import functional as F

from easyllm.batches.packing import Batch
from easyllm.examples.labels import TARGET
from easyllm.examples.preferences import encode_labelled, read_labelled
from easyllm.examples.prepare import Encoded, PreparationStats, check_samples
from easyllm.examples.ratings import prepare_ratings, read_ratings
from easyllm.examples.sample import AnySample, Sample
from easyllm.models import to_classifier
from easyllm.nn.decoder import Decoder
from easyllm.ops.cross_entropy import IGNORE_INDEX
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.train.data_config import (
    GeneratedConfig,
    PreferenceDataConfig,
    RatingsDataConfig,
    RowsConfig,
    UnpairedPreferenceDataConfig,
)
from easyllm.train.objectives.objective import (
    LossOutput,
    Objective,
    ObjectiveConfig,
    register_objective,
)
from easyllm.train.objectives.pairs import (
    MARGIN,
    RANK,
    group_of,
    num_groups,
    pairs_of,
    read_pairs,
    reward_metrics,
)
from easyllm.train.objectives.router import routing_of, with_router_losses
from easyllm.train.objectives.sequence_logprobs import hidden_at

IS_GOOD = "is_good"
"""Extra of a response with a binary label: 1 if it is good, else 0."""


class RewardConfig(ObjectiveConfig):
    """A reward model: Bradley-Terry on pairs, or pointwise on binary labels or scores."""

    kind: Literal["reward"] = "reward"
    center: NonNegativeFloat = Field(
        default=0.0,
        description="Coefficient of the squared sum of a pair's rewards, which keeps their mean "
        "near 0 (arXiv 2312.09244, section 3); pairs only.",
    )


class Reward(Objective):
    """The loss of rewards on pairs, rankings, binary labels or scores; see the module."""

    generates = False
    also_trained = ("score",)

    def __init__(self, config: RewardConfig | None = None) -> None:
        self.config = config or RewardConfig()

    def prepare(
        self, data: RowsConfig | GeneratedConfig, files: Sequence[Path], tokenizer: Tokenizer
    ) -> tuple[Sequence[AnySample], PreparationStats]:
        """Reads rows of the configured kind and tokenizes them; see `Objective.prepare`."""
        match data:
            case PreferenceDataConfig():
                rankings, account = read_pairs(data, files, tokenizer, margins=True)
                groups = [group_of(r, [read_at_end(e) for e in r.sequences]) for r in rankings]
                return groups, account
            case UnpairedPreferenceDataConfig():
                return _binary_samples(data, files, tokenizer)
            case RatingsDataConfig():
                rows = (read_ratings(file, score_key=data.score_key) for file in files)
                rated, account = prepare_ratings(
                    chain.from_iterable(rows),
                    tokenizer,
                    max_seq_len=data.max_seq_len,
                    overlong=data.overlong,
                )
                return [read_at_end(e, {TARGET: score}) for e, score in rated], account
        raise AssertionError("checked by the configuration")

    def prepare_model(self, model: Decoder, *, seed: int) -> Decoder:
        """Returns the model with a reward head, which is new unless it has one."""
        return model if model.config.num_labels == 1 else to_classifier(model, 1, seed=seed)

    def num_terms(self, batch: Batch) -> int:
        """Returns the number of groups of responses, or of responses that are not compared."""
        return num_groups(batch) if RANK in batch.extras else batch.num_trained

    def loss(self, model: Decoder, batch: Batch) -> LossOutput:
        """Returns the loss summed over groups or responses, and metrics of the rewards."""
        routing = routing_of(model)
        rewards = sequence_rewards(model, batch, routing=routing)
        output = self._pairwise if RANK in batch.extras else self._pointwise
        return with_router_losses(output(rewards, batch), routing)

    def _pointwise(self, rewards: Tensor, batch: Batch) -> LossOutput:
        count = batch.num_trained  # a padding sequence comes last
        rewards = rewards[:count]
        if IS_GOOD in batch.extras:
            good = batch.extras[IS_GOOD][:count].to(rewards.dtype)
            total = F.binary_cross_entropy_with_logits(rewards, good, reduction="sum")
            right = ((rewards > 0) == (good > 0)).float().mean()
            return LossOutput(total, count, metrics={"reward_accuracy": float(right)})
        wanted = batch.extras[TARGET][:count].to(rewards.dtype)
        return LossOutput(F.mse_loss(rewards, wanted, reduction="sum"), count)

    def _pairwise(self, rewards: Tensor, batch: Batch) -> LossOutput:
        pairs = pairs_of(batch)
        better, worse = pairs.of(rewards)
        margins = batch.extras[MARGIN][pairs.better].to(rewards.dtype)
        losses = pairwise_losses(better, worse, margins, center=self.config.center)
        metrics = reward_metrics(pairs, rewards)
        return LossOutput(pairs.sum(losses), pairs.num_groups, metrics=metrics)


def pairwise_losses(better: Tensor, worse: Tensor, margins: Tensor, *, center: float) -> Tensor:
    """Returns the Bradley-Terry loss of each pair, [N].

    Args:
        better, worse: [N], rewards of both sides.
        margins: [N], by how much the better one must win.
        center: coefficient of the squared sum of both rewards.
    """
    return -F.logsigmoid(better - worse - margins) + center * (better + worse).square()


def sequence_rewards(model: Decoder, batch: Batch, *, routing: list[Any] | None = None) -> Tensor:
    """Returns the reward of each sequence, read at its last token: [S], fp32 or wider.

    Args:
        model: a model with a head of one output.
        batch: packed sequences; where its extras describe groups with a common prompt, the prompt
            is computed once. A padding sequence has a meaningless reward.
        routing: a list that collects the decisions of MoE routers.
    """
    last = batch.cu_seqlens[1:].long() - 1
    return model.head(hidden_at(model, batch, last, routing=routing)).squeeze(1)


def read_at_end(encoded: Encoded, extras: dict[str, float] | None = None) -> Sample:
    """Returns a sequence up to its last trained token, at which the reward is read."""
    length = max(number for number, trained in enumerate(encoded.mask) if trained) + 1
    labels = (*(IGNORE_INDEX,) * (length - 1), 0)  # marks the token; its value has no meaning
    return Sample(tuple(encoded.token_ids[:length]), labels, extras or {})


def _binary_samples(
    data: UnpairedPreferenceDataConfig, files: Sequence[Path], tokenizer: Tokenizer
) -> tuple[list[Sample], PreparationStats]:
    account = PreparationStats()
    rows = chain.from_iterable(read_labelled(file) for file in files)
    samples = [
        read_at_end(encoded, {IS_GOOD: float(label)})
        for encoded, label in encode_labelled(
            rows, tokenizer, account, max_seq_len=data.max_seq_len, overlong=data.overlong
        )
    ]
    check_samples(account, data.max_seq_len)
    return samples, account


register_objective(
    RewardConfig,
    build=Reward,
    data=(PreferenceDataConfig, UnpairedPreferenceDataConfig, RatingsDataConfig),
    generates=Reward.generates,
)

__all__ = [
    "IS_GOOD",
    "Reward",
    "RewardConfig",
    "pairwise_losses",
    "read_at_end",
    "sequence_rewards",
]
