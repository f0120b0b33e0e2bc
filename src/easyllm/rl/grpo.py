"""GRPO and its relatives: several answers per prompt, compared with each other, without a critic.

Which choices make which published method is a table in docs/rl.md.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from easyllm.examples.prepare import PreparationStats
from easyllm.examples.sample import AnySample
from easyllm.nn.decoder import Decoder
from easyllm.rl.advantages import group_relative, leave_one_out, reinforce_plus_plus
from easyllm.rl.config import GRPOConfig
from easyllm.rl.experience import Experience
from easyllm.rl.kl import kl_estimate
from easyllm.rl.policy import PolicyObjective
from easyllm.rl.prompts import ArithmeticConfig, PromptSample, PromptsConfig
from easyllm.rl.rollout_figures import equal_groups
from easyllm.rl.warm_start import WarmStart
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.train.data_config import GeneratedConfig, RowsConfig
from easyllm.train.objectives import RunSetup, register_objective


class GRPO(PolicyObjective):
    """Group-relative policy optimisation (Shao et al. 2024, arXiv 2402.03300) and its relatives."""

    config: GRPOConfig

    def __init__(self, config: GRPOConfig) -> None:
        super().__init__(config)
        self._prepared: tuple[list[PromptSample], Tokenizer] | None = None
        self._warm_start = None if config.warm_start is None else WarmStart(config.warm_start)

    def prepare_model(self, model: Decoder, *, seed: int) -> Decoder:
        """Returns the model after supervised training, if the recipe asks for it."""
        if self._warm_start is None or model.device.type == "meta":
            return model
        assert self._prepared is not None, "the data are read before the model is built"
        prompts, tokenizer = self._prepared
        return self._warm_start.run(model, prompts, tokenizer, seed=seed)

    def prepare(
        self, data: RowsConfig | GeneratedConfig, files: Sequence[Path], tokenizer: Tokenizer
    ) -> tuple[Sequence[AnySample], PreparationStats]:
        """Reads or generates the prompts to train on; see `Objective.prepare`."""
        samples, stats = super().prepare(data, files, tokenizer)
        prompts = [sample for sample in samples if isinstance(sample, PromptSample)]
        self._prepared = prompts, tokenizer
        return samples, stats

    def start(self, setup: RunSetup) -> None:
        """Creates the engine that samples; see `PolicyObjective.start`."""
        super().start(setup)
        if self._warm_start is not None:
            self._warm_start.forget()

    def wants_more(self, experiences: Sequence[Experience], num_prompts: int, tries: int) -> bool:
        """Returns whether too few groups have different rewards (dynamic sampling)."""
        config = self.config
        if config.equal_groups != "resample" or tries > config.max_resamples:
            return False
        groups = {each.group for each in experiences}
        return len(groups - equal_groups(experiences)) < num_prompts

    def learn_from(self, experiences: list[Experience]) -> dict[str, float]:
        """Leaves out groups of equal rewards, if asked for; see `PolicyObjective.learn_from`."""
        equal, figures = equal_groups(experiences), {}
        if self.config.equal_groups == "resample":
            groups = {each.group for each in experiences}
            figures = {"rl/sampled_groups": float(len(groups)), "rl/resampled_equal": len(equal)}
            kept = [each for each in experiences if each.group not in equal]
            experiences[:] = kept or experiences
        if self.config.equal_groups == "drop":
            for each in experiences:
                each.is_trained = each.is_trained and each.group not in equal
        return super().learn_from(experiences) | figures

    def advantages(self, experiences: list[Experience]) -> dict[str, float]:
        """Gives each token of an answer the advantage of the answer."""
        found = self._of_answers(self._rewards(experiences))
        for each, advantage in zip(experiences, found.tolist(), strict=True):
            each.tokens["advantages"] = torch.full((each.length,), advantage)
        return {"rl/advantage_abs": float(found.abs().mean())}

    def _rewards(self, experiences: Sequence[Experience]) -> Tensor:
        """Returns the rewards [N], less the KL penalty of the answer if it is in the reward."""
        rewards = torch.tensor([each.reward for each in experiences], dtype=torch.float64)
        kl = self.config.kl
        if kl.coefficient == 0 or kl.place != "reward":
            return rewards
        penalties = [
            float(
                kl_estimate(
                    each.tokens["old_logprobs"], each.tokens["reference_logprobs"], kl.estimator
                ).sum()
            )
            for each in experiences
        ]
        return rewards - self.controller.coefficient * torch.tensor(penalties, dtype=torch.float64)

    def _of_answers(self, rewards: Tensor) -> Tensor:
        config, size = self.config, self.config.rollout.group_size
        match config.advantage:
            case "group":
                return group_relative(rewards, size, config.scale)
            case "rloo":
                return leave_one_out(rewards, size)
        baseline = config.advantage == "reinforce++_baseline"
        return reinforce_plus_plus(rewards, size, baseline=baseline)


register_objective(GRPOConfig, build=GRPO, data=(PromptsConfig, ArithmeticConfig))

__all__ = ["GRPO"]
