"""Judges the answers of a rollout: rewards, penalties, normalisation, and failures."""

from collections.abc import Callable, Sequence

from easyllm.core.progress import console
from easyllm.rl.config import PolicyConfig
from easyllm.rl.experience import Experience
from easyllm.rl.reward_model import check_reward_model
from easyllm.rl.rewards import MAX_FAILURES, Answer, Rewarded, RewardError, RewardSum
from easyllm.rl.running_moments import RunningMoments
from easyllm.tokenizer.tokenizer import Tokenizer

Scores = Callable[[Sequence[Answer]], list[float]]


class RewardStage:
    """The rewards of a run.

    Args:
        config: penalties, normalisation and clipping.
        rewards: the reward functions.

    Attributes:
        failures: number of failures of reward functions so far.
        moments: running mean and variance of the rewards.
    """

    def __init__(self, config: PolicyConfig, rewards: RewardSum) -> None:
        self.config, self.rewards = config, rewards
        self.failures, self.moments = 0, RunningMoments()
        self._model: tuple[Scores, float] | None = None
        self._components: dict[str, float] = {}

    def check(self, tokenizer: Tokenizer) -> None:
        """Checks the reward model, if there is one, before anything is loaded or written.

        Raises:
            ConfigError, SourceError, CheckpointError: it cannot score this tokenizer's answers.
        """
        if self.config.reward_model is not None:
            check_reward_model(self.config.reward_model, tokenizer)

    @property
    def keys(self) -> dict[str, str]:
        """The keys of a row that built-in rewards read, each with the reward's name."""
        return self.rewards.keys

    def add_model(self, scores: Scores, weight: float) -> None:
        """Adds a reward model's scores to the sum."""
        self._model = scores, weight

    def judge(self, experiences: Sequence[Experience]) -> None:
        """Sets the reward of each answer, and which answers have no loss.

        Raises:
            RewardError: reward functions have failed three times; the message quotes the samples.
        """
        config = self.config
        found = self._rewarded(experiences)
        self._note_failures(found)
        totals = [
            total - self._length_penalty(each)
            for total, each in zip(found.totals, experiences, strict=True)
        ]
        for each, total in zip(experiences, totals, strict=True):
            each.score = total
        if config.normalise == "running":
            self.moments.update(totals)
            totals = [total / self.moments.std for total in totals]
        if config.clip_reward is not None:
            bound = config.clip_reward
            totals = [min(max(total, -bound), bound) for total in totals]
        for each, total, failed in zip(experiences, totals, found.failed, strict=True):
            each.reward = total
            masked = config.length_limit.truncated == "mask" and each.answer.truncated
            each.is_trained = not (failed or masked)
        self._components = _means(found)

    def figures(self) -> dict[str, float]:
        """Returns the mean of each component in the last rollout, and the failures so far."""
        return self._components | {"rl/reward_failures": float(self.failures)}

    def evaluate(self, experiences: Sequence[Experience]) -> dict[str, float]:
        """Returns the mean reward and components of answers, without penalties."""
        found = self._rewarded(experiences)
        self._note_failures(found)
        count = len(experiences)
        return {
            "reward": sum(found.totals) / count,
            **{f"reward/{name}": sum(v) / count for name, v in found.components.items()},
            "length_tokens": sum(each.length for each in experiences) / count,
            "truncated_share": sum(each.answer.truncated for each in experiences) / count,
        }

    def numbers(self) -> list[float]:
        """Returns the counters, for a checkpoint."""
        moments = self.moments
        return [float(self.failures), moments.count, moments.mean, moments.squares]

    def set_numbers(self, numbers: Sequence[float]) -> None:
        """Restores what `numbers` returned."""
        failures, *moments = numbers
        self.failures, self.moments = int(failures), RunningMoments(*moments)

    def _rewarded(self, experiences: Sequence[Experience]) -> Rewarded:
        answers = [_answer(each) for each in experiences]
        found = self.rewards(answers)
        if self._model is None:
            return found
        scores, weight = self._model
        values = scores(answers)
        totals = [total + weight * v for total, v in zip(found.totals, values, strict=True)]
        return Rewarded(totals, {**found.components, "model": values}, found.failed, found.messages)

    def _note_failures(self, found: Rewarded) -> None:
        """Counts failures, prints the first ones, and stops the run after three."""
        for message in found.messages[:MAX_FAILURES]:
            console().print(f"warning: {message}", markup=False, soft_wrap=True)
        self.failures += len(found.messages)
        if self.failures >= MAX_FAILURES:
            raise RewardError(
                f"reward functions have failed {self.failures} times, the last time: "
                f"{found.messages[-1]}; fix the function, or the rows that it reads"
            )

    def _length_penalty(self, each: Experience) -> float:
        """Returns what is subtracted for a long answer, or for one without an EOS token."""
        limit, most = self.config.length_limit, self.config.rollout.max_tokens
        penalty = limit.missing_eos_penalty if each.answer.truncated else 0.0
        if limit.penalty_tokens is not None:
            over = each.length - (most - limit.penalty_tokens)
            penalty += min(max(over / limit.penalty_tokens, 0.0), 1.0)
        return penalty


def _answer(each: Experience) -> Answer:
    return Answer(
        prompt=each.prompt.text,
        text=each.answer.text,
        num_tokens=each.length,
        truncated=each.answer.truncated,
        row=each.prompt.row,
        prompt_ids=each.prompt.token_ids,
        token_ids=each.answer.token_ids,
    )


def _means(found: Rewarded) -> dict[str, float]:
    return {
        f"rl/reward/{name}": sum(values) / max(1, len(values))
        for name, values in found.components.items()
    }


__all__ = ["RewardStage"]
