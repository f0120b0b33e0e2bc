"""PPO with a critic (Schulman et al. 2017, arXiv 1707.06347), and the tricks of PPO-max.

A token's reward is -β·KL, plus the score at the last token. GAE turns rewards and the critic's
values into advantages and returns; the policy loss uses the former, the critic's loss the latter.
The details follow Huang et al. 2024, arXiv 2403.17031, and Zheng et al. 2023, arXiv 2307.04964.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from easyllm.batches.loader import Loader, LoaderState
from easyllm.batches.packing import Batch
from easyllm.checkpoint.stream import Under
from easyllm.examples.prepare import PreparationStats
from easyllm.examples.sample import AnySample
from easyllm.nn.config import ModelConfig
from easyllm.nn.decoder import Decoder
from easyllm.ops.cross_entropy import IGNORE_INDEX
from easyllm.rl.advantages import explained_variance, gae, whiten
from easyllm.rl.critic import Critic, stored_values
from easyllm.rl.experience import Experience, padded, store
from easyllm.rl.kl import kl_estimate
from easyllm.rl.logprobs import answer_hidden, answer_lengths
from easyllm.rl.memory import critic_bytes
from easyllm.rl.policy import PolicyObjective
from easyllm.rl.policy_loss import token_weights
from easyllm.rl.ppo_config import PPOConfig
from easyllm.rl.prompts import ArithmeticConfig, PromptsConfig
from easyllm.rl.value_loss import value_loss
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.train.data_config import GeneratedConfig, RowsConfig
from easyllm.train.evaluating import evaluating
from easyllm.train.objectives import (
    LanguageModel,
    LossOutput,
    MemorySetup,
    RunSetup,
    register_objective,
)
from easyllm.train.text_samples import samples_of_file


class PPO(PolicyObjective):
    """Proximal policy optimisation with a critic."""

    config: PPOConfig
    undivided = "the critic has an optimizer of its own"

    def __init__(self, config: PPOConfig) -> None:
        super().__init__(config)
        self._critic: Critic | None = None
        self._rollouts = 0
        self._mix: Loader | None = None
        self._mixed: tuple[list[Batch], int] | None = None

    @property
    def needs_old_logprobs(self) -> bool:
        """Always: the KL in the reward, and the advantages, are those of the rollout."""
        return True

    @property
    def trains_policy(self) -> bool:
        """Whether the rollouts in which only the critic learns are over."""
        return self._rollouts > self.config.critic.warm_up

    def prepare(
        self, data: RowsConfig | GeneratedConfig, files: Sequence[Path], tokenizer: Tokenizer
    ) -> tuple[Sequence[AnySample], PreparationStats]:
        """Reads or generates the prompts, and reads the texts of the pretraining mix."""
        mix = self.config.pretraining
        if mix is not None:
            samples = list[AnySample]()
            for file in mix.files:
                samples += samples_of_file(file, tokenizer, mix.max_seq_len)
            self._mix = Loader(samples, batch_size=mix.batch_size, micro_batch_tokens=2048, seed=0)
        return super().prepare(data, files, tokenizer)

    def held_bytes(self, model: ModelConfig, setup: MemorySetup) -> dict[str, int]:
        """Returns the bytes of the critic, if it has a body of its own, and of the rollouts."""
        found = super().held_bytes(model, setup)
        if self.config.critic.body == "own":
            found["critic"] = critic_bytes(model, setup)
        return found

    def start(self, setup: RunSetup) -> None:
        """Creates the critic; see `PolicyObjective.start`."""
        super().start(setup)
        self._critic = Critic(self.config.critic, setup)

    # ---- rollouts

    def learn_from(self, experiences: list[Experience]) -> dict[str, float]:
        """Adds values to the tokens, then advantages; see `PolicyObjective.learn_from`."""
        critic, model = self._critic, self._model
        assert critic is not None, "the run has started"
        assert model is not None, "the run has started"
        self._rollouts += 1
        with torch.no_grad(), evaluating(model), self.products():
            for group, batch, rows in self.batches(experiences):
                if critic.is_shared:
                    values = critic.of_hidden(answer_hidden(model, batch, rows)).cpu()
                else:
                    values = stored_values(critic, batch, rows)
                for each, part in zip(group, values.split([e.length for e in group]), strict=True):
                    each.tokens["values"] = part.clone()
        return super().learn_from(experiences)

    def advantages(self, experiences: list[Experience]) -> dict[str, float]:
        """Adds advantages and returns to the tokens, by GAE."""
        config = self.config
        for each in experiences:
            each.tokens["rewards"] = self._token_rewards(each)
        rewards, mask = padded(experiences, "rewards")
        if config.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        values, _ = padded(experiences, "values")
        # one more value than tokens: after the end of an answer, nothing is to be gained
        values = torch.cat([values, torch.zeros(len(values), 1)], dim=1)
        advantages, returns = gae(rewards, values, mask, gamma=config.gamma, lam=config.lam)
        figures = {
            "rl/explained_variance": explained_variance(values[:, :-1][mask], returns[mask]),
            "rl/value": float(values[:, :-1][mask].mean()),
            "rl/return": float(returns[mask].mean()),
            "rl/advantage_abs": float(advantages[mask].abs().mean()),
        }
        if config.whiten_advantages:
            advantages = whiten(advantages, mask)
        if config.clip_advantage is not None:
            advantages = advantages.clamp(-config.clip_advantage, config.clip_advantage)
        store(experiences, "advantages", advantages)
        store(experiences, "returns", returns)
        for each in experiences:
            del each.tokens["rewards"]
        return figures

    def _token_rewards(self, each: Experience) -> Tensor:
        """Returns -β·KL at each token, and the score in addition at the last one."""
        rewards, kl = torch.zeros(each.length), self.config.kl
        if kl.coefficient > 0 and kl.place == "reward":
            old, reference = each.tokens["old_logprobs"], each.tokens["reference_logprobs"]
            rewards -= self.controller.coefficient * kl_estimate(old, reference, kl.estimator)
        rewards[-1] += each.reward
        return rewards

    # ---- updates

    def begin_step(
        self,
        model: Decoder,  # noqa: ARG002 - of the interface
        batches: Sequence[Batch],
    ) -> None:
        """Discards old gradients of the critic, and takes the next texts of the mix."""
        assert self._critic is not None, "the run has started"
        self._critic.clear()
        if self._mix is not None and self.trains_policy:
            terms = sum(self.num_terms(batch) for batch in batches)
            self._mixed = self._mix.next_step(), terms

    def loss(self, model: Decoder, batch: Batch) -> LossOutput:
        """Returns the policy loss, and the critic's loss as a further term."""
        found = super().loss(model, batch)
        extra = found.auxiliary
        metrics, counts = dict(found.metrics), dict(found.counts)
        critic = self._critic
        assert critic is not None, "the run has started"
        if not critic.is_shared:
            labelled = batch.labels != IGNORE_INDEX
            rows = labelled.nonzero().squeeze(1)
            values = critic.of_batch(batch, rows)
            extras = {name: batch.extras[name][rows] for name in batch.token_extras}
            lengths, config = answer_lengths(labelled, batch.lengths), self.config
            most = config.rollout.max_tokens
            weights = token_weights(lengths, config.loss.averaging, most, values)
            extra, figures = self._value_term(values, extras, weights)
            metrics |= figures
        if self._mixed is not None:
            mixed, value = self._mixing(model)
            extra = mixed if extra is None else extra + mixed
            metrics["rl/pretraining_nats"] = value
            counts["rl/pretraining_nats"] = 1  # once per step, whatever its micro-batches
        return LossOutput(found.sum, found.num_tokens, extra, metrics, counts)

    def critic_loss(
        self, hidden: Tensor, extras: Mapping[str, Tensor], weights: Tensor
    ) -> tuple[Tensor, dict[str, float]] | None:
        """Returns the critic's loss on the actor's hidden states, for a shared body."""
        critic = self._critic
        if critic is None or not critic.is_shared or not len(weights):
            return None
        return self._value_term(critic.of_hidden(hidden), extras, weights)

    def after_backward(self, gradient_scale: float, rate_factor: float) -> None:
        """Updates the critic."""
        assert self._critic is not None, "the run has started"
        self._critic.step(gradient_scale, rate_factor)
        self._mixed = None

    def _value_term(
        self, values: Tensor, extras: Mapping[str, Tensor], weights: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        config = self.config.critic
        loss, clipped = value_loss(values, extras["values"], extras["returns"], clip=config.clip)
        figures = {
            "rl/value_loss": float(loss.detach().mean()) if len(loss) else 0.0,
            "rl/value_clip_fraction": float(clipped.float().mean()) if len(loss) else 0.0,
        }
        return config.coefficient * (loss * weights).sum(), figures

    def _mixing(self, model: Decoder) -> tuple[Tensor, float]:
        """Returns the cross-entropy of the mix, scaled for the step's divisor, once per step."""
        assert self._mixed is not None, "checked by the caller"
        assert self.config.pretraining is not None, "checked by the caller"
        (batches, terms), self._mixed = self._mixed, None
        tokens = max(1, sum(batch.num_trained for batch in batches))
        objective = LanguageModel()
        parts = [objective.loss(model, batch.to(model.device)).sum for batch in batches]
        mean = torch.stack(parts).sum() / tokens
        return self.config.pretraining.coefficient * mean * terms, float(mean.detach())

    # ---- state

    def numbers(self) -> list[float]:
        """Returns the counters of the run, for a checkpoint."""
        state = LoaderState() if self._mix is None else self._mix.state
        return [*super().numbers(), float(self._rollouts), float(state.epoch), float(state.cursor)]

    def set_numbers(self, numbers: Sequence[float]) -> None:
        """Restores what `numbers` returned."""
        *rest, rollouts, epoch, cursor = numbers
        super().set_numbers(rest)
        self._rollouts = int(rollouts)
        if self._mix is not None:
            self._mix.state = LoaderState(int(epoch), int(cursor))

    def tensors(self) -> dict[str, Tensor]:
        """Returns the counters, the critic's weights and its optimizer's state."""
        assert self._critic is not None, "the run has started"
        own = {f"critic.{name}": value for name, value in self._critic.tensors().items()}
        return super().tensors() | own

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores what `tensors` returned."""
        super().load_tensors(tensors)
        assert self._critic is not None, "the run has started"
        self._critic.load_tensors(Under(tensors, "critic."))


register_objective(PPOConfig, build=PPO, data=(PromptsConfig, ArithmeticConfig))

__all__ = ["PPO"]
