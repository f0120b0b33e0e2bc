"""Configuration of PPO: the critic, the advantages, and the preset PPO-max."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from easyllm.core.config import Config
from easyllm.core.json_types import Json, JsonObject
from easyllm.core.paths import PathText
from easyllm.rl.config import KLConfig, PolicyConfig
from easyllm.rl.policy_loss import PolicyLossConfig
from easyllm.rl.rollout import RolloutConfig
from easyllm.train.data_config import ONE_OR_MORE

PPO_MAX: JsonObject = {
    "kl": {"coefficient": 0.02, "estimator": "k1", "place": "reward"},
    "normalise": "running",
    "clip_reward": 10.0,
    "clip_advantage": 0.5,
    "whiten_advantages": True,
    "loss": {"clip_low": 0.2, "clip_high": 0.2},
    "critic": {"clip": 0.2, "rate_factor": 3.0, "warm_up": 4},
}
"""The values of PPO-max (Zheng et al. 2023, arXiv 2307.04964, section 4; MOSS-RLHF's defaults):
rewards divided by their running deviation and clipped, a KL penalty per token, clipped advantages,
ratios and values, and a critic that learns faster and before the actor."""


class CriticConfig(Config):
    """The critic, which predicts the return at each token of an answer."""

    body: Literal["own", "shared"] = Field(
        default="own",
        description="Whether the critic is a separate copy of the model with a head (`own`), or a "
        "head on the actor's hidden states (`shared`).",
    )
    trains_body: bool = Field(
        default=True,
        description="Whether a shared body is trained by the critic's loss, too; false trains the "
        "head alone.",
    )
    coefficient: PositiveFloat = Field(
        default=0.5, description="Factor of the critic's loss, which matters for a shared body."
    )
    rate_factor: PositiveFloat = Field(
        default=1.0, description="Learning rate of the critic, as a factor on the actor's."
    )
    clip: PositiveFloat | None = Field(
        default=0.2, description="Largest change of a value per rollout; null clips none."
    )
    warm_up: NonNegativeInt = Field(
        default=0, description="Number of first rollouts in which only the critic learns."
    )


class PretrainingMixConfig(Config):
    """Texts whose cross-entropy is added to the loss, so that the model does not forget them."""

    files: Annotated[tuple[PathText, ...], Field(min_length=1), ONE_OR_MORE] = Field(
        description="Files of conversations or texts, as a list or one path."
    )
    coefficient: PositiveFloat = Field(default=0.1, description="Factor of the cross-entropy.")
    batch_size: PositiveInt = Field(default=4, description="Texts per optimizer step.")
    max_seq_len: int = Field(default=256, ge=2, description="Maximum length of a text, in tokens.")


class PPOConfig(PolicyConfig):
    """Proximal policy optimisation with a critic."""

    kind: Literal["ppo"] = "ppo"
    preset: Literal["ppo", "ppo-max"] = Field(
        default="ppo",
        description="`ppo-max` sets the values of MOSS-RLHF for all options below that the recipe "
        "does not give (listed in docs/rl.md).",
    )
    rollout: RolloutConfig = Field(
        default=RolloutConfig(group_size=1), description="How answers are sampled."
    )
    loss: PolicyLossConfig = Field(
        default=PolicyLossConfig(clip_high=0.2),
        description="Ratio, clipping and averaging of the loss.",
    )
    kl: KLConfig = Field(
        default=KLConfig(coefficient=0.05, estimator="k1", place="reward"),
        description="The KL penalty, subtracted from each token's reward.",
    )
    critic: CriticConfig = Field(default=CriticConfig(), description="The critic.")
    gamma: float = Field(default=1.0, gt=0.0, le=1.0, description="Discount γ per token.")
    lam: float = Field(default=0.95, ge=0.0, le=1.0, description="λ of GAE.")
    whiten_rewards: bool = Field(
        default=False,
        description="Whether token rewards are scaled to unit variance, keeping their mean.",
    )
    whiten_advantages: bool = Field(
        default=True, description="Whether advantages are scaled to mean 0 and variance 1."
    )
    clip_advantage: PositiveFloat | None = Field(
        default=None, description="Bound on the absolute value of an advantage; null sets none."
    )
    pretraining: PretrainingMixConfig | None = Field(
        default=None, description="Texts to train on at the same time; null has none."
    )

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, values: Json) -> Json:
        """Fills in the preset's values where the recipe gives none."""
        if not isinstance(values, Mapping) or values.get("preset") != "ppo-max":
            return values
        found: JsonObject = dict(values)
        for key, preset in PPO_MAX.items():
            given = found.get(key)
            if isinstance(given, Config):
                given = given.model_dump(exclude_unset=True)
            if isinstance(preset, Mapping) and isinstance(given, Mapping):
                found[key] = {**preset, **given}
            elif key not in found:
                found[key] = preset
        return found

    @model_validator(mode="after")
    def _trains_something(self) -> "PPOConfig":
        if self.critic.body == "own" and not self.critic.trains_body:
            raise ValueError(
                "critic.trains_body=false is for a shared body; set critic.body=shared, or remove "
                "trains_body"
            )
        return self


__all__ = ["PPO_MAX", "CriticConfig", "PPOConfig", "PretrainingMixConfig"]
