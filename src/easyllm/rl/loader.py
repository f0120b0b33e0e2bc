"""The loader of a policy-gradient run: rolls out, then yields the updates on the rollout.

Its position is the next prompt, the number of the rollout, and the answers of a rollout whose
updates are not all done; a run that resumes in between continues with the same answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from easyllm.batches.loader import StepSize, with_fillers
from easyllm.batches.packing import Batch, pack, split_by_tokens
from easyllm.core.errors import ConfigError
from easyllm.rl.experience import Experience, Stored, from_json, to_json, with_groups
from easyllm.rl.prompts import PromptSample
from easyllm.rl.rollout import RolloutConfig
from easyllm.train.objectives import StepSizes

if TYPE_CHECKING:
    from easyllm.batches.rank_share import RankShare
    from easyllm.core.json_types import JsonObject


@dataclass(slots=True)
class RolloutState:
    """The position of the next step.

    Attributes:
        epoch: number of complete passes over the prompts.
        cursor: number of prompts of the epoch that have been used.
        rollout: number of rollouts so far.
        update: number of updates on the newest rollout.
        samples: its answers as JSON, until the last update.
        figures: its metrics.
    """

    epoch: int = 0
    cursor: int = 0
    rollout: int = 0
    update: int = 0
    samples: "list[JsonObject]" = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)


class Collector(Protocol):
    """Samples and judges answers; implemented by the objective."""

    def answer(self, prompts: Sequence[PromptSample], rollout: int) -> list[Experience]:
        """Returns the answers to prompts, with their rewards."""

    def wants_more(self, experiences: Sequence[Experience], num_prompts: int, tries: int) -> bool:
        """Returns whether further prompts are to be answered for the same rollout."""

    def learn_from(self, experiences: list[Experience]) -> dict[str, float]:
        """Completes the experiences of a rollout; returns its metrics."""


class RolloutLoader:
    """Yields the micro-batches of one update after another.

    Args:
        prompts: the prompts to train on.
        sizes: the sizes of a step; `batch_size` is the prompts per rollout.
        rollout: the number of updates per rollout.
        collector: samples and judges answers.

    Raises:
        ConfigError: the size of a step is not given in prompts.
    """

    def __init__(
        self,
        prompts: Sequence[PromptSample],
        sizes: StepSizes,
        rollout: RolloutConfig,
        collector: Collector,
    ) -> None:
        if sizes.batch_size is None:
            raise ConfigError(
                "batch_tokens gives the size of a step in tokens, which answers do not have "
                "before they are sampled; set batch_size (prompts per rollout), and batch_tokens "
                "to null"
            )
        if rollout.minibatches > sizes.batch_size:
            raise ConfigError(
                f"rollout.minibatches={rollout.minibatches} of batch_size={sizes.batch_size} "
                "prompts would leave some empty; lower minibatches"
            )
        self.prompts, self.sizes, self.rollout = prompts, sizes, rollout
        self.collector, self.batch_size = collector, sizes.batch_size
        self.state = RolloutState()
        self.share: RankShare | None = None
        self.last: list[int] = []
        self.figures: Mapping[str, float] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps per pass over the prompts."""
        return -(-len(self.prompts) // self.batch_size) * self.rollout.num_updates

    def largest_step(self, steps: int) -> StepSize:  # noqa: ARG002 - prompts are drawn anew
        """Returns a bound: the longest prompts, each with answers of the maximum length."""
        rollout, most = self.rollout, self.rollout.max_tokens
        prompts = min(self.batch_size, len(self.prompts))
        answers = -(-prompts // rollout.minibatches) * rollout.group_size
        longest = max(len(prompt.token_ids) for prompt in self.prompts) + most
        fitting = max(1, self.sizes.micro_batch_tokens // longest)
        rows = min(answers, fitting)
        return StepSize(
            tokens=rows * longest,
            trained=rows * most,
            longest=longest,
            micro_batches=-(-answers // fitting),
        )

    def next_step(self) -> list[Batch]:
        """Returns the micro-batches of the next update, after a new rollout if it is the first."""
        state = self.state
        if not state.samples:
            self._roll_out()
        self.figures = state.figures
        epoch, part = divmod(state.update, self.rollout.minibatches)
        groups = sorted({int(each["group"]) for each in state.samples})
        if self.rollout.num_updates > 1:
            seed = (self.sizes.seed * 1_000_003 + state.rollout) * 1_009 + epoch
            generator = torch.Generator().manual_seed(seed % 2**63)
            order = torch.randperm(len(groups), generator=generator).tolist()
            groups = [groups[i] for i in order]
        count = self.rollout.minibatches
        chosen = set(groups[len(groups) * part // count : len(groups) * (part + 1) // count])
        answers = [from_json(each) for each in state.samples if each["group"] in chosen]
        answers = [each for each in answers if each.sample.num_trained] or answers[:1]
        state.update += 1
        if state.update == self.rollout.num_updates:
            state.samples, state.update = [], 0
        return self._packed(answers)

    def _packed(self, answers: Sequence[Stored]) -> list[Batch]:
        """Returns this rank's micro-batches of the answers of an update."""
        samples, most = [each.sample for each in answers], self.sizes.micro_batch_tokens
        if self.share is not None:
            groups, fillers = self.share.groups([each.num_tokens for each in samples], most)
        else:
            numbers = iter(range(len(samples)))
            groups = [[next(numbers) for _ in few] for few in split_by_tokens(samples, most)]
            fillers = 0
        batches = [
            pack(with_groups([samples[n] for n in group], [answers[n] for n in group]))
            for group in groups
        ]
        return with_fillers(batches, fillers)

    def _roll_out(self) -> None:
        """Answers the next prompts, and stores what is to be learned from."""
        state, experiences, tries = self.state, list[Experience](), 0
        self.last = []
        while True:
            indices = self._next_prompts()
            self.last += indices
            prompts = [self.prompts[i] for i in indices]
            answered = self.collector.answer(prompts, state.rollout)
            state.rollout += 1
            groups = 1 + max((each.group for each in experiences), default=-1)
            for each in answered:
                each.group += groups
            experiences += answered
            tries += 1
            if not self.collector.wants_more(experiences, self.batch_size, tries):
                break
        state.figures = self.collector.learn_from(experiences)
        state.samples = [to_json(each) for each in experiences]

    def _next_prompts(self) -> list[int]:
        """Returns the indices of the next prompts; the last ones of an epoch may be fewer."""
        state = self.state
        seed = (self.sizes.seed * 1_000_003 + state.epoch) % 2**63
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.prompts), generator=generator).tolist()
        chosen: list[int] = order[state.cursor : state.cursor + self.batch_size]
        state.cursor += len(chosen)
        if state.cursor >= len(order):
            state.epoch, state.cursor = state.epoch + 1, 0
        return chosen


__all__ = ["Collector", "RolloutLoader", "RolloutState"]
