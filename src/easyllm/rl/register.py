"""Registers the objectives of this package for recipes when it is imported."""

from easyllm.rl.grpo import GRPO

POLICY_OBJECTIVES = (GRPO,)

__all__ = ["POLICY_OBJECTIVES"]
