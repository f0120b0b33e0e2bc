"""The evening: its plan scales with the hours, is stored, and is not mixed with another."""

import json

import pytest

from easyllm.core.errors import ConfigError, DataError, OutputError
from easyllm.lab import find_lab, run_lab
from easyllm.lab.evening_plan import PLAN_FILE, load_plan, plan_evening, quick_plan
from easyllm.lab.runner import parameters_of
from easyllm.pipeline.recipe import Recipe, TrainStage, find_recipe, load_recipe

RATE = 60e9


def recipe_of(plan) -> Recipe:
    return load_recipe(find_recipe("evening"), ["output=x", *plan.overrides])


@pytest.mark.parametrize("hours", [0.25, 0.5, 1.0, 3.0, 12.0])
def test_the_plan_fits_into_the_hours_and_its_recipe_is_valid(hours):
    plan = plan_evening(hours, RATE, language="zh", seed=3)
    assert sum(plan.seconds.values()) <= hours * 3600
    recipe = recipe_of(plan)
    assert recipe.seed == recipe.stages["sft"].seed == 3
    assert recipe.stages["pretrain"].model.depth == plan.depth
    replayed = recipe.stages["grpo"].objective.warm_start.replay
    assert replayed == tuple(map(str, recipe.stages["sft"].data.train))
    assert plan.language == "zh"
    assert set(plan.seconds) == {*recipe.stages, "gptq", "gguf", "serve"}


def test_more_hours_train_more_tokens_and_deeper_models():
    short, long = (plan_evening(h, RATE, language="en", seed=0) for h in (1, 10))
    tokens = [recipe_of(plan).stages["pretrain"].max_tokens for plan in (short, long)]
    assert tokens[1] > 1.5 * tokens[0]
    assert long.depth > short.depth


def test_the_quick_recipe_is_valid_and_small():
    recipe = recipe_of(quick_plan(language="en", seed=0))
    stages = [stage for stage in recipe.stages.values() if isinstance(stage, TrainStage)]
    assert len(stages) == 4
    assert recipe.stages["pretrain"].max_tokens <= 20_000


def test_a_stored_plan_is_the_same(tmp_path):
    plan = plan_evening(2.0, RATE, language="en", seed=0)
    assert load_plan(tmp_path) is None
    plan.save(tmp_path)
    assert load_plan(tmp_path) == plan
    (tmp_path / PLAN_FILE).write_text("{}")
    with pytest.raises(DataError, match="is damaged"):
        load_plan(tmp_path)


def test_other_parameters_are_refused_in_the_folder_of_an_evening(tmp_path):
    lab = find_lab("evening")
    plan_evening(2.0, RATE, language="en", seed=0).save(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(OutputError, match=r"an evening with other parameters.*2 hours"):
        run_lab(lab, tmp_path, words=["hours=3"])
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    with pytest.raises(OutputError, match="an evening with other parameters"):
        run_lab(lab, tmp_path, words=["hours=2", "language=zh"])
    quick_plan(language="en", seed=0).save(tmp_path)
    with pytest.raises(OutputError, match="an evening with other parameters"):
        run_lab(lab, tmp_path)
    (tmp_path / PLAN_FILE).write_text(json.dumps({"lab": "lora"}))
    with pytest.raises(OutputError, match="something else than lab evening"):
        run_lab(lab, tmp_path)


def test_hours_outside_the_range_are_refused():
    with pytest.raises(ConfigError, match="hours"):
        parameters_of(find_lab("evening"), ["hours=100"], quick=False)
