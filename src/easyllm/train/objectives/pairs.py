"""What the objectives on preference pairs share: data, pairs of a batch, metrics.

A sample is one group of K responses to a prompt (K = 2 for a pair), best first; its pairs (i, j)
are those in which i has a better rank than j. A group of several pairs counts as one term: its loss
is the mean over its pairs (Ouyang et al. 2022, arXiv 2203.02155, eq. 1).

Extras of each sequence:

    answers  K                       rank    of the response, 0 is best
    prompt   length of the prompt    margin  of the pair, 0 if none is given
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path

import torch
from torch import Tensor

from easyllm.batches.packing import Batch
from easyllm.batches.shared_prompts import ANSWERS, PROMPT, group_sizes
from easyllm.core.errors import DataError
from easyllm.examples.prepare import PreparationStats
from easyllm.examples.rankings import EncodedRanking, Ranking, prepare_rankings, read_rankings
from easyllm.examples.sample import AnySample, Sample, SampleGroup
from easyllm.nn.decoder import Decoder
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.train.data_config import GeneratedConfig, PreferenceDataConfig, RowsConfig
from easyllm.train.objectives.objective import LossOutput, Objective
from easyllm.train.objectives.router import routing_of, with_router_losses
from easyllm.train.objectives.sequence_logprobs import SequenceLogprobs, sequence_logprobs

RANK, MARGIN = "rank", "margin"


@dataclass(frozen=True, slots=True)
class Pairs:
    """The pairs of a batch.

    Attributes:
        better, worse: [N] int64, sequence numbers of the better and the worse response.
        weights: [N] fp64, 1 / the number of pairs in the group.
        num_groups: number of groups.
    """

    better: Tensor
    worse: Tensor
    weights: Tensor
    num_groups: int

    def of(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the values [N] of the better and the worse responses for `values: [S]`."""
        return values[self.better], values[self.worse]

    def sum(self, values: Tensor) -> Tensor:
        """Returns the sum over groups of the mean of a group's `values: [N]`."""
        return (values * self.weights.to(values.dtype)).sum()

    def mean(self, values: Tensor) -> float:
        """Returns the mean over groups of the mean of a group's `values: [N]`."""
        return float(self.sum(values.detach().float())) / max(1, self.num_groups)


def pairs_of(batch: Batch) -> Pairs:
    """Returns the pairs of a batch, whose padding belongs to none."""
    ranks, answers = batch.extras[RANK].tolist(), batch.extras[ANSWERS].tolist()
    better, worse, weights = list[int](), list[int](), list[float]()
    start = num_groups = 0
    for size in group_sizes(batch):
        group = range(start, start + size)
        found = [(i, j) for i in group for j in group if ranks[i] < ranks[j]]
        if answers[start]:
            num_groups += 1
            better += [i for i, _ in found]
            worse += [j for _, j in found]
            weights += [1 / len(found)] * len(found)
        start += size
    device = batch.token_ids.device
    weight = torch.tensor(weights, dtype=torch.float64, device=device)
    index = torch.tensor([better, worse], dtype=torch.int64, device=device)
    return Pairs(index[0], index[1], weight, num_groups)


def num_groups(batch: Batch) -> int:
    """Returns the number of groups of a batch, without padding."""
    answers = batch.extras[ANSWERS].tolist()
    starts = accumulate(group_sizes(batch), initial=0)
    return sum(start < len(answers) and answers[start] > 0 for start in starts)


def read_pairs(
    data: PreferenceDataConfig, files: Sequence[Path], tokenizer: Tokenizer, *, margins: bool
) -> tuple[list[EncodedRanking], PreparationStats]:
    """Reads and encodes pairs and rankings.

    Args:
        margins: whether the objective reads margins.

    Raises:
        DataError: a row cannot be used, has a margin that is not read, or no sample remains.
    """
    rows = chain.from_iterable(read_rankings(file) for file in files)
    return prepare_rankings(
        rows if margins else _without_margins(rows),
        tokenizer,
        max_seq_len=data.max_seq_len,
        overlong=data.overlong,
    )


def _without_margins(given: Iterable[Ranking]) -> Iterable[Ranking]:
    for ranking in given:
        if ranking.margin is not None:
            raise DataError(
                f"{ranking.location} has the key 'margin', which only reward models read "
                "(objective.kind=reward); remove the key"
            )
        yield ranking


def group_of(ranking: EncodedRanking, samples: Sequence[Sample]) -> SampleGroup:
    """Returns the samples of a ranking's sequences as a group with its extras."""
    parts = [
        Sample(
            sample.token_ids,
            sample.labels,
            {
                ANSWERS: len(samples),
                PROMPT: min(ranking.num_prompt, sample.num_tokens),
                RANK: rank,
                MARGIN: ranking.margin or 0.0,
            },
        )
        for sample, rank in zip(samples, ranking.ranks, strict=True)
    ]
    return SampleGroup(tuple(parts))


class PairObjective(Objective):
    """The base of objectives on log-probabilities of pairs; a subclass defines `pair_losses`.

    Attributes:
        beta: factor of a response's implicit reward in the metrics.
    """

    beta: float = 1.0

    def prepare(
        self, data: RowsConfig | GeneratedConfig, files: Sequence[Path], tokenizer: Tokenizer
    ) -> tuple[Sequence[AnySample], PreparationStats]:
        """Reads pairs and rankings and tokenizes them; see `Objective.prepare`."""
        assert isinstance(data, PreferenceDataConfig), "checked by the configuration"
        encoded, account = read_pairs(data, files, tokenizer, margins=False)
        groups = [group_of(ranking, [e.sample() for e in ranking.sequences]) for ranking in encoded]
        return groups, account

    def num_terms(self, batch: Batch) -> int:
        """Returns the number of groups (pairs or rankings)."""
        return num_groups(batch)

    def loss(self, model: Decoder, batch: Batch) -> LossOutput:
        """Returns the loss summed over groups, with rewards, their margin and accuracy."""
        pairs, routing = pairs_of(batch), routing_of(model)
        policy = sequence_logprobs(model, batch, routing=routing)
        losses, rewards = self.pair_losses(policy, batch, pairs)
        metrics = reward_metrics(pairs, rewards) | logprob_metrics(pairs, policy)
        output = LossOutput(pairs.sum(losses), pairs.num_groups, metrics=metrics)
        return with_router_losses(output, routing)

    def pair_losses(
        self, policy: SequenceLogprobs, batch: Batch, pairs: Pairs
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss of each pair [N], and the implicit reward of each sequence [S]."""
        raise NotImplementedError


def reward_metrics(pairs: Pairs, rewards: Tensor) -> dict[str, float]:
    """Returns means of rewards, their margin and the share of pairs in the right order.

    Args:
        rewards: [S], a reward of each sequence.
    """
    chosen, rejected = pairs.of(rewards.detach())
    return {
        "reward_margin": pairs.mean(chosen - rejected),
        "reward_accuracy": pairs.mean(chosen > rejected),
        "rewards/chosen": pairs.mean(chosen),
        "rewards/rejected": pairs.mean(rejected),
    }


def logprob_metrics(pairs: Pairs, policy: SequenceLogprobs) -> dict[str, float]:
    """Returns the mean summed log-probabilities of both sides, in nats."""
    chosen, rejected = pairs.of(policy.sums.detach())
    return {"logprobs/chosen": pairs.mean(chosen), "logprobs/rejected": pairs.mean(rejected)}


__all__ = [
    "MARGIN",
    "RANK",
    "PairObjective",
    "Pairs",
    "group_of",
    "logprob_metrics",
    "num_groups",
    "pairs_of",
    "read_pairs",
    "reward_metrics",
]
