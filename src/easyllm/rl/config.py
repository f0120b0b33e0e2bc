"""Configuration of the policy-gradient objectives: `objective: {kind: grpo}`, `{kind: ppo}`."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from easyllm.core.config import Config
from easyllm.core.paths import PathText
from easyllm.rl.kl import Estimator
from easyllm.rl.policy_loss import PolicyLossConfig
from easyllm.rl.rewards import RewardFunctionConfig
from easyllm.rl.rollout import RolloutConfig
from easyllm.train.data_config import ONE_OR_MORE
from easyllm.train.objectives import ObjectiveConfig


class KLConfig(Config):
    """The penalty on the KL divergence from the reference, the model before the run."""

    coefficient: NonNegativeFloat = Field(
        default=0.0,
        description="β; 0 has no penalty, and no reference is loaded.",
    )
    estimator: Estimator = Field(
        default="k3", description="Estimate per token: k1, k2 or k3 (see docs/rl.md)."
    )
    weighted: bool = Field(
        default=False,
        description="Whether a penalty in the loss is multiplied by the ratio π / π_old, which "
        "makes value and gradient of k3 unbiased when the policy has moved since the rollout.",
    )
    place: Literal["loss", "reward"] = Field(
        default="loss",
        description="Whether the penalty is a term of the loss, or is subtracted from the reward.",
    )
    target: PositiveFloat | None = Field(
        default=None,
        description="KL in nats per answer that β is adapted to after each rollout; null keeps β.",
    )

    @model_validator(mode="after")
    def _has_a_gradient(self) -> "KLConfig":
        if self.coefficient and self.estimator == "k1" and self.place == "loss":
            raise ValueError(
                "estimator=k1 as a term of the loss has a gradient of expectation 0; set "
                "estimator to k2 or k3, or place=reward"
            )
        if self.target is not None and not self.coefficient:
            raise ValueError("target adapts the coefficient, which is 0; set coefficient above 0")
        return self


class MismatchConfig(Config):
    """What is done where sampler and trainer disagree on the probability of a token."""

    correction: Literal["none", "truncate", "mask"] = Field(
        default="none",
        description="`truncate` multiplies a token's loss by π_old / π_rollout, at most cap; "
        "`mask` drops tokens whose ratio is above cap or below 1 / cap.",
    )
    cap: float = Field(default=2.0, gt=1.0, description="Bound on the importance weight.")


class RewardModelConfig(Config):
    """A trained reward model, whose score at the last token is a reward."""

    model: PathText = Field(description="Source of the reward model, with a head of one score.")
    weight: float = Field(default=1.0, description="Factor of its score in the sum.")


class LengthLimitConfig(Config):
    """What is done with answers that reach the maximum length."""

    truncated: Literal["keep", "mask"] = Field(
        default="keep",
        description="Whether truncated answers are trained on (`keep`) or have no loss (`mask`).",
    )
    penalty_tokens: PositiveInt | None = Field(
        default=None,
        description="Length of the interval before the maximum in which a penalty grows from 0 to "
        "1 (DAPO, arXiv 2503.14476, section 3.4); null has none.",
    )
    missing_eos_penalty: NonNegativeFloat = Field(
        default=0.0, description="Subtracted from the reward of an answer without an EOS token."
    )


class PolicyConfig(ObjectiveConfig):
    """What all policy-gradient objectives have in common."""

    rewards: tuple[RewardFunctionConfig, ...] = Field(
        default=(), description="The reward functions; their weighted sum is the reward."
    )
    reward_model: RewardModelConfig | None = Field(
        default=None, description="A reward model whose score is added; null has none."
    )
    rollout: RolloutConfig = Field(default=RolloutConfig(), description="How answers are sampled.")
    loss: PolicyLossConfig = Field(
        default=PolicyLossConfig(), description="Ratio, clipping and averaging of the loss."
    )
    kl: KLConfig = Field(default=KLConfig(), description="The KL penalty.")
    mismatch: MismatchConfig = Field(
        default=MismatchConfig(), description="Correction of differences to the sampler."
    )
    length_limit: LengthLimitConfig = Field(
        default=LengthLimitConfig(), description="Answers that reach the maximum length."
    )
    normalise: Literal["none", "running"] = Field(
        default="none",
        description="Whether rewards are divided by their running standard deviation.",
    )
    clip_reward: PositiveFloat | None = Field(
        default=None, description="Bound on the absolute value of a reward; null sets none."
    )
    log_entropy: bool = Field(
        default=True,
        description="Whether the entropy is computed exactly, over the whole vocabulary, for the "
        "log; false estimates it from the sampled tokens.",
    )

    @model_validator(mode="after")
    def _has_a_reward(self) -> "PolicyConfig":
        if not self.rewards and self.reward_model is None:
            raise ValueError("nothing gives a reward; set rewards or reward_model")
        return self


class WarmStartConfig(Config):
    """Supervised training on right answers before the first rollout, for a model from scratch."""

    steps: PositiveInt = Field(default=200, description="Number of optimizer steps.")
    batch_size: PositiveInt = Field(default=64, description="Answers per step.")
    learning_rate: PositiveFloat = Field(default=1e-3, description="Learning rate of AdamW.")
    answer_key: str = Field(default="answer", description="Key of the right answer in a row.")
    wrong_key: str | None = Field(
        default=None,
        description="Key of a wrong answer in a row, which the model also learns; null has none.",
    )
    wrong_copies: PositiveInt = Field(
        default=1, description="How often the wrong answer occurs for each right one."
    )
    replay: Annotated[tuple[PathText, ...], ONE_OR_MORE] = Field(
        default=(),
        description="Files of conversations that are learned again at the same time, so that a "
        "model that was fine-tuned before does not forget them.",
    )


class GRPOConfig(PolicyConfig):
    """Group-relative policy optimisation, and its relatives without a critic."""

    kind: Literal["grpo"] = "grpo"
    advantage: Literal["group", "rloo", "reinforce++", "reinforce++_baseline"] = Field(
        default="group",
        description="Advantage of an answer: relative to its `group` (GRPO), to the mean of the "
        "others (`rloo`), or to the batch (`reinforce++`, with the group's mean as a baseline "
        "first in the last).",
    )
    scale: Literal["group", "batch", "none"] = Field(
        default="group",
        description="Divisor of the advantage `group`: the standard deviation of the group, of the "
        "batch, or none (Dr. GRPO).",
    )
    equal_groups: Literal["keep", "drop", "resample"] = Field(
        default="keep",
        description="Groups whose rewards are all equal, which teach nothing: counted in the "
        "loss's divisor (`keep`), left out (`drop`), or replaced by further prompts (`resample`, "
        "dynamic sampling of arXiv 2503.14476, section 3.2).",
    )
    max_resamples: PositiveInt = Field(
        default=4, description="Maximum number of further rollouts with equal_groups=resample."
    )
    warm_start: WarmStartConfig | None = Field(
        default=None, description="Supervised training before the first rollout; null has none."
    )

    @model_validator(mode="after")
    def _groups_have_two(self) -> "GRPOConfig":
        if self.rollout.group_size == 1 and self.advantage != "reinforce++":
            raise ValueError(
                f"advantage={self.advantage} compares the answers of a group, but "
                "rollout.group_size=1; set it to 2 or more, or advantage=reinforce++"
            )
        return self


__all__ = [
    "GRPOConfig",
    "KLConfig",
    "LengthLimitConfig",
    "MismatchConfig",
    "PolicyConfig",
    "RewardModelConfig",
    "WarmStartConfig",
]
