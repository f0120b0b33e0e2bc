"""The objective that GRPO and PPO share: rollouts, rewards, log-probabilities and the loss."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from easyllm.batches.loader import StepLoader
from easyllm.batches.packing import Batch, pack, split_by_tokens
from easyllm.core.errors import ConfigError
from easyllm.examples.prepare import PreparationStats
from easyllm.examples.sample import AnySample
from easyllm.nn.config import ModelConfig
from easyllm.nn.decoder import Decoder
from easyllm.ops.cross_entropy import IGNORE_INDEX
from easyllm.rl.config import PolicyConfig
from easyllm.rl.duration import rollout_seconds
from easyllm.rl.experience import Experience, with_groups
from easyllm.rl.kl import KLController, kl_estimate
from easyllm.rl.loader import RolloutLoader
from easyllm.rl.logprobs import answer_hidden, answer_lengths, entropies, token_logprobs
from easyllm.rl.memory import policy_bytes
from easyllm.rl.mismatch import importance_weights, mark_mismatched, mismatch_figures
from easyllm.rl.policy_loss import policy_loss, ratio_figures, token_weights
from easyllm.rl.prompts import PromptSample, prepare_prompts
from easyllm.rl.reward_model import reward_model
from easyllm.rl.reward_stage import RewardStage
from easyllm.rl.rewards import RewardSum
from easyllm.rl.rollout import Sampler, prompt_seed
from easyllm.rl.rollout_figures import rollout_figures
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.train.data_config import GeneratedConfig, RowsConfig
from easyllm.train.evaluating import evaluating
from easyllm.train.objectives import (
    LossOutput,
    MemorySetup,
    Objective,
    RunSetup,
    Speed,
    StepSizes,
    routing_of,
    with_router_losses,
)


class PolicyObjective(Objective):
    """The policy-gradient loss on answers that are sampled from the model itself.

    A subclass defines `advantages`.

    Args:
        config: the configuration.

    Raises:
        ConfigError: a reward function does not exist.
    """

    loss_is_steady = False
    evaluates_start = True
    generates_data = True

    def __init__(self, config: PolicyConfig) -> None:
        self.config = config
        self.needs_reference = config.kl.coefficient > 0
        self.controller = KLController(config.kl.coefficient, config.kl.target)
        self.rewards = RewardStage(config, RewardSum(config.rewards))
        most, keys = config.rollout.max_tokens, self.rewards.keys
        self._prompts = partial(prepare_prompts, max_new_tokens=most, keys=keys)
        self._sampler: Sampler | None = None
        self._model: Decoder | None = None
        self._longest, self._micro_batch_tokens, self._seed = 0, 1, 0

    # ---- data

    def prepare(
        self, data: RowsConfig | GeneratedConfig, files: Sequence[Path], tokenizer: Tokenizer
    ) -> tuple[Sequence[AnySample], PreparationStats]:
        """Reads or generates the prompts to train on; see `Objective.prepare`."""
        self._longest = data.max_seq_len
        self.rewards.check(tokenizer)
        samples, stats = self._prompts(data, files, tokenizer)
        # an epoch answers each prompt several times, and may learn from an answer several times
        passes = self.config.rollout.group_size * self.config.rollout.epochs
        stats.tokens *= passes
        stats.trained_tokens *= passes
        return samples, stats

    def prepare_eval(
        self, data: RowsConfig | GeneratedConfig, files: Sequence[Path], tokenizer: Tokenizer
    ) -> Sequence[AnySample]:
        """Reads or generates the prompts to evaluate on."""
        return self._prompts(data, files, tokenizer, held_out=True)[0]

    def build_loader(self, samples: Sequence[AnySample], sizes: StepSizes) -> StepLoader:
        """Returns the loader, which rolls out whenever all updates on a rollout are done."""
        self._micro_batch_tokens, self._seed = sizes.micro_batch_tokens, sizes.seed
        prompts = [sample for sample in samples if isinstance(sample, PromptSample)]
        return RolloutLoader(prompts, sizes, self.config.rollout, self)

    def num_shared_tokens(self, samples: Sequence[AnySample]) -> int:
        """Returns the tokens of prompts that the updates compute once for a group of answers."""
        rollout = self.config.rollout
        copies = 0 if rollout.deterministic else rollout.group_size - 1
        return copies * rollout.epochs * sum(sample.num_tokens for sample in samples)

    def sampling_seconds(
        self, model: ModelConfig, loader: StepLoader, steps: int, speed: Callable[[], Speed]
    ) -> float:
        """Returns the seconds of all rollouts, with the log-probabilities of their answers."""
        assert isinstance(loader, RolloutLoader), "the loader that this objective builds"
        passes = int(self.needs_old_logprobs) + int(self.needs_reference)
        one = rollout_seconds(loader, model, passes=passes, speed=speed())
        return one * -(-steps // self.config.rollout.num_updates)

    def held_bytes(self, model: ModelConfig, setup: MemorySetup) -> dict[str, int]:
        """Returns the bytes of the cache of rollouts, and of the reward model."""
        return policy_bytes(self.config, model, setup)

    def start(self, setup: RunSetup) -> None:
        """Creates the engine that samples, and loads the reward model.

        Raises:
            ConfigError: the model is trained with dropout, so that the first ratio is not 1.
        """
        if setup.drops:
            raise ConfigError(
                f"objective {self.config.kind} compares probabilities before and after an update, "
                "which dropout would change at random; set dropout=0 (and adapter.dropout=0)"
            )
        self._model = setup.model
        self._sampler = Sampler(
            setup.model, setup.tokenizer, self.config.rollout, longest=self._longest
        )
        if self.config.reward_model is not None:
            scores = reward_model(self.config.reward_model, setup.model.device)
            self.rewards.add_model(scores, self.config.reward_model.weight)

    # ---- rollouts

    def answer(self, prompts: Sequence[PromptSample], rollout: int) -> list[Experience]:
        """Returns the answers to prompts with their rewards, those of a prompt adjacent.

        Each rank answers its part of the prompts.
        """
        assert self._sampler is not None, "the run has started"
        seeds = [prompt_seed(self._seed, rollout, i) for i in range(len(prompts))]
        if self.ranks is None:
            answers = self._sampler(prompts, seeds)
        else:
            mine = self.ranks.part(len(prompts))
            answers = self.ranks.gather_items(self._sampler(prompts[mine], seeds[mine]))
        experiences = [
            Experience(prompt, each, group=number)
            for number, (prompt, found) in enumerate(zip(prompts, answers, strict=True))
            for each in found
        ]
        self._judge(experiences)
        return experiences

    def _judge(self, experiences: list[Experience]) -> None:
        """Sets the rewards; rank 0 decides, as a reward function may not return the same twice."""
        if self.ranks is None or self.ranks.rank == 0:
            self.rewards.judge(experiences)
        if self.ranks is None:
            return
        judged = [(each.score, each.reward, each.is_trained) for each in experiences]
        found = self.ranks.gather(judged)[0]
        for each, values in zip(experiences, found, strict=True):
            each.score, each.reward, each.is_trained = values

    def wants_more(
        self,
        experiences: Sequence[Experience],  # noqa: ARG002 - in overrides
        num_prompts: int,  # noqa: ARG002
        tries: int,  # noqa: ARG002
    ) -> bool:
        """Returns whether further prompts are to be answered: by default none."""
        return False

    @property
    def is_relative(self) -> bool:
        """Always: the ratio compares the policy with what it was before the update."""
        return True

    def learn_from(self, experiences: list[Experience]) -> dict[str, float]:
        """Adds log-probabilities and advantages to the answers; returns the rollout's metrics."""
        config = self.config
        for each in experiences:
            each.tokens["rollout_logprobs"] = torch.tensor(each.answer.logprobs)
        if self.needs_old_logprobs:
            assert self._model is not None, "the run has started"
            with self.products():
                store = partial(self._store_logprobs, name="old_logprobs", model=self._model)
                self._store_by_ranks(experiences, "old_logprobs", store)
        figures: dict[str, float] = {}
        if self.reference is not None:
            self._store_by_ranks(experiences, "reference_logprobs", self._store_reference)
        if self.needs_old_logprobs:
            figures |= mismatch_figures(experiences)
        if config.mismatch.correction == "mask":
            figures |= mark_mismatched(experiences, config.mismatch.cap)
        if self.reference is not None and self.needs_old_logprobs:
            figures |= self._kl_figures(experiences)
        figures |= self.advantages(experiences)
        for each in experiences:
            if config.kl.place == "reward":
                each.tokens.pop("reference_logprobs", None)
        return figures | rollout_figures(experiences) | self.rewards.figures()

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether the trainer's log-probabilities are computed before the updates.

        With one update per rollout they are those of the update's own forward pass.
        """
        config = self.config
        in_reward = config.kl.coefficient > 0 and config.kl.place == "reward"
        adapts = config.kl.target is not None
        masks = config.mismatch.correction == "mask"
        return config.rollout.num_updates > 1 or in_reward or masks or adapts

    @property
    def trains_policy(self) -> bool:
        """Whether the current update changes the policy; by default always."""
        return True

    def advantages(self, experiences: list[Experience]) -> dict[str, float]:
        """Adds `advantages` to the tokens of each answer; returns metrics."""
        raise NotImplementedError

    def _store_by_ranks(
        self,
        experiences: Sequence[Experience],
        name: str,
        compute: Callable[[Sequence[Experience]], None],
    ) -> None:
        """Calls `compute`, which stores values of answer tokens, on this rank's part of them."""
        if self.ranks is None:
            compute(experiences)
            return
        mine = experiences[self.ranks.part(len(experiences))]
        compute(mine)
        found = self.ranks.gather_items([each.tokens[name] for each in mine])
        for each, values in zip(experiences, found, strict=True):
            each.tokens[name] = values

    @torch.no_grad()
    def _store_logprobs(self, experiences: Sequence[Experience], name: str, model: Decoder) -> None:
        """Stores the log-probability of each answer token under a model."""
        deterministic = self.config.rollout.deterministic
        with evaluating(model):
            for group, batch, rows in self.batches(experiences):
                context = batch.context(deterministic=deterministic)
                hidden = answer_hidden(model, batch, rows, deterministic=deterministic)
                found = token_logprobs(
                    model,
                    hidden,
                    batch.labels[rows],
                    self.config.rollout.training_params,
                    context.of_rows(rows),
                )
                _store(group, name, found)

    @torch.no_grad()
    def _store_reference(self, experiences: Sequence[Experience]) -> None:
        """Stores the log-probability of each answer token under the reference."""
        reference, temperature = self.reference, self.config.rollout.temperature
        assert reference is not None, "set by the run"
        for group, batch, rows in self.batches(experiences):
            hidden, labels = reference.hidden(batch)[rows], batch.labels[rows]
            parts = []
            for h, y in zip(hidden.split(512), labels.split(512), strict=True):
                logits = reference.head(h) / temperature
                parts.append(logits.log_softmax(-1).gather(1, y[:, None]).squeeze(1))
            _store(group, "reference_logprobs", torch.cat(parts))

    def batches(
        self, experiences: Sequence[Experience]
    ) -> Iterable[tuple[list[Experience], Batch, Tensor]]:
        """Yields answers as packed batches, each with the indices of the labelled rows."""
        assert self._model is not None, "the run has started"
        samples = [each.scored_sample() for each in experiences]
        end = 0
        for part in split_by_tokens(samples, self._micro_batch_tokens):
            group = list(experiences[end : end + len(part)])
            end += len(part)
            batch = pack(with_groups(part, group)).to(self._model.device)
            yield group, batch, (batch.labels != IGNORE_INDEX).nonzero().squeeze(1)

    def _kl_figures(self, experiences: Sequence[Experience]) -> dict[str, float]:
        """Returns the KL from the reference per answer and per token, and adapts β to it."""
        sums, count = 0.0, 0
        for each in experiences:
            old, reference = each.tokens["old_logprobs"], each.tokens["reference_logprobs"]
            sums += float(kl_estimate(old, reference, "k3").sum())
            count += each.length
        per_answer = sums / max(1, len(experiences))
        figures = {
            "rl/kl_nats": per_answer,
            "rl/kl_per_token_nats": sums / max(1, count),
            "rl/kl_coefficient": self.controller.coefficient,
        }
        self.controller.update(per_answer)
        return figures

    # ---- the loss

    def num_terms(self, batch: Batch) -> int:
        """Returns the divisor of the loss that a batch adds: answer tokens, or answers."""
        if self.config.loss.averaging == "dapo":
            return batch.num_trained
        return sum(n > 0 for n in answer_lengths(batch.labels != IGNORE_INDEX, batch.lengths))

    def loss(self, model: Decoder, batch: Batch) -> LossOutput:
        """Returns the policy loss of the answer tokens of a batch, and metrics."""
        config = self.config
        labelled = batch.labels != IGNORE_INDEX
        rows, lengths = labelled.nonzero().squeeze(1), answer_lengths(labelled, batch.lengths)
        deterministic = config.rollout.deterministic
        context = batch.context(deterministic=deterministic)
        routing = routing_of(model) if self.trains_policy else None
        hidden = answer_hidden(model, batch, rows, deterministic=deterministic, routing=routing)
        sampling = config.rollout.training_params
        logprobs = token_logprobs(
            model, hidden, batch.labels[rows], sampling, context.of_rows(rows)
        )
        extras = {name: batch.extras[name][rows] for name in batch.token_extras}
        old = extras.get("old_logprobs")
        old = logprobs.detach() if old is None else old
        found = policy_loss(logprobs, old, extras["advantages"], lengths, config.loss)
        per_token, metrics = found.per_token, ratio_figures(found)
        if config.mismatch.correction == "truncate":
            per_token = per_token * importance_weights(
                old, extras["rollout_logprobs"], config.mismatch.cap
            )
        if "old_logprobs" not in extras:
            metrics |= _mismatch(old - extras["rollout_logprobs"])
        if "reference_logprobs" in extras:
            penalty, figures = self._penalty(logprobs, extras["reference_logprobs"], old, lengths)
            per_token, metrics = per_token + penalty, metrics | figures
        weights = token_weights(
            lengths, config.loss.averaging, config.rollout.max_tokens, per_token
        )
        total = (per_token * weights).sum() * float(self.trains_policy)
        metrics["rl/entropy"] = self._entropy(model, hidden.detach(), old)
        terms = self.num_terms(batch)
        more = self.critic_loss(hidden, extras, weights)
        if more is not None:
            output = LossOutput(total, terms, more[0], metrics | more[1])
        else:
            output = LossOutput(total, terms, metrics=metrics if len(rows) else {})
        return with_router_losses(output, routing)

    def critic_loss(
        self,
        hidden: Tensor,  # noqa: ARG002 - in overrides
        extras: Mapping[str, Tensor],  # noqa: ARG002
        weights: Tensor,  # noqa: ARG002
    ) -> tuple[Tensor, dict[str, float]] | None:
        """Returns a further term of the loss on the actor's hidden states; by default none."""
        return None

    def _entropy(self, model: Decoder, hidden: Tensor, logprobs: Tensor) -> float:
        """Returns the mean entropy per token in nats: exact, or from the sampled tokens."""
        if not len(hidden):
            return 0.0
        if self.config.log_entropy:
            return float(entropies(model, hidden, self.config.rollout.temperature).mean())
        return -float(logprobs.mean())

    def _penalty(
        self, logprobs: Tensor, reference: Tensor, old: Tensor, lengths: Sequence[int]
    ) -> tuple[Tensor, dict[str, float]]:
        """Returns the KL penalty of each token, and the metrics of the KL.

        `rl/kl_pull` is the mean of ∂penalty/∂log π · (log π - log π_ref), which is positive if the
        penalty's gradient points back to the reference.
        """
        config, beta = self.config.kl, self.controller.coefficient
        leaf = logprobs.detach().requires_grad_(True)
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(
                beta * kl_estimate(leaf, reference, config.estimator).sum(), leaf
            )
        penalty = beta * kl_estimate(logprobs, reference, config.estimator)
        if config.weighted:
            penalty = penalty * torch.exp(logprobs - old)
        figures = {"rl/kl_pull": float((slope * (leaf.detach() - reference)).mean())}
        if not self.needs_old_logprobs:
            kl = kl_estimate(leaf.detach(), reference, "k3")
            answers = max(1, sum(n > 0 for n in lengths))
            figures |= {
                "rl/kl_nats": float(kl.sum()) / answers,
                "rl/kl_per_token_nats": float(kl.mean()),
                "rl/kl_coefficient": beta,
            }
        return penalty, figures

    # ---- evaluation and state

    def evaluate_samples(
        self, model: Decoder, samples: Sequence[AnySample], micro_batch_tokens: int
    ) -> dict[str, float]:
        """Returns the mean reward of greedy answers to the held-out prompts, and its parts."""
        del model, micro_batch_tokens  # the sampler holds the model
        assert self._sampler is not None, "the run has started"
        prompts = [sample for sample in samples if isinstance(sample, PromptSample)]
        answers = self._sampler(prompts, [0] * len(prompts), greedy=True)
        experiences = [
            Experience(prompt, each[0]) for prompt, each in zip(prompts, answers, strict=True)
        ]
        return self.rewards.evaluate(experiences)

    def monitored(self, figures: Mapping[str, float]) -> float:
        """Returns the negative reward, because lower is better."""
        return -figures["eval/reward"]

    def tensors(self) -> dict[str, Tensor]:
        """Returns β, and the counters of the rewards."""
        return {"numbers": torch.tensor(self.numbers(), dtype=torch.float64)}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores what `tensors` returned."""
        self.set_numbers(tensors["numbers"].tolist())

    def numbers(self) -> list[float]:
        """Returns the counters of the run, for a checkpoint."""
        return [self.controller.coefficient, *self.rewards.numbers()]

    def set_numbers(self, numbers: Sequence[float]) -> None:
        """Restores what `numbers` returned."""
        self.controller.coefficient, *rest = numbers
        self.rewards.set_numbers(rest)


def _store(group: Sequence[Experience], name: str, values: Tensor) -> None:
    for each, part in zip(group, values.cpu().split([e.length for e in group]), strict=True):
        each.tokens[name] = part.clone()


def _mismatch(difference: Tensor) -> dict[str, float]:
    """Returns the mean absolute difference to the sampler's log-probabilities."""
    if not len(difference):
        return {}
    return {"rl/mismatch_nats": float(difference.abs().mean())}


__all__ = ["PolicyObjective"]
