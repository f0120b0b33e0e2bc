"""Registers the objectives of this package for recipes when it is imported."""

from easyllm.rl.grpo import GRPO
from easyllm.rl.ppo import PPO

POLICY_OBJECTIVES = (GRPO, PPO)

__all__ = ["POLICY_OBJECTIVES"]
