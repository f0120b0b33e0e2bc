"""Pipelines: stages with tracked inputs, which are skipped when up to date and can be resumed."""

from easyllm.pipeline.recipe import Recipe, find_recipe, load_recipe
from easyllm.pipeline.run import RecipePlan, StageResult, check_recipe, plan_recipe, run_recipe

__all__ = [
    "Recipe",
    "RecipePlan",
    "StageResult",
    "check_recipe",
    "find_recipe",
    "load_recipe",
    "plan_recipe",
    "run_recipe",
]
