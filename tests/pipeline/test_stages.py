"""Names of stages, stages whose settings or results have changed, and folders in use."""

import json
import shutil

import pytest
import yaml

from easyllm.core.errors import EasyllmError
from easyllm.core.folder_lock import locked_folder
from easyllm_command import GOOD, easyllm

BAD_NAMES = ["..", ".", "a/b", "../x", "/tmp/x", "", "stages", "recipe.yaml", "Pending", "tune.1"]
BAD_NAMES += ["a b", ".hidden", "x" * 101, "summary.json", "a\nb"]


@pytest.fixture
def recipe(tmp_path, tiny_folder):
    """A recipe of three quick stages: evaluate, train, evaluate again."""
    data = tmp_path / "rows.jsonl"
    data.write_text(GOOD)
    score = {"kind": "evaluate", "data": {"rows": str(data)}, "max_tokens": 2}
    tune = {
        "kind": "train",
        "model": str(tiny_folder),
        "data": {"train": [str(data)], "max_seq_len": 64},
        "adapter": {"kind": "lora", "rank": 2},
        "max_steps": 1,
    }
    merged = {"kind": "merge", "model": str(tiny_folder), "adapter": "@tune", "check": False}
    stages = {"before": {"model": str(tiny_folder)} | score, "tune": tune, "merged": merged}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "r", "output": str(tmp_path / "run")}))
    return write(path, stages=stages)


def write(path, **changes):
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes, sort_keys=False))
    return path


def skipped(done):
    return [line.split()[1].strip(":") for line in done.stderr.splitlines() if "skipped" in line]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_is_no_folder_of_its_own_is_refused(recipe, tmp_path, name):
    kept = tmp_path / "x" / "kept.txt"
    kept.parent.mkdir()
    kept.write_text("kept")
    stages = yaml.safe_load(recipe.read_text())["stages"]
    done = easyllm("run", write(recipe, stages={name: stages["before"]}))
    assert done.returncode == 2
    assert f"stage name {name!r}" in done.stderr
    assert kept.read_text() == "kept"
    assert not (tmp_path / "run").exists()


def test_names_that_differ_only_in_case_are_refused(recipe):
    stages = yaml.safe_load(recipe.read_text())["stages"]
    done = easyllm("run", write(recipe, stages={"a": stages["before"], "A": stages["before"]}))
    assert done.returncode == 2
    assert "'a' and 'A' differ only in case" in done.stderr


def test_a_stage_with_a_dot_in_its_name_can_be_referred_to(recipe):
    stages = yaml.safe_load(recipe.read_text())["stages"]
    stages = {"v1.a": stages["tune"], "merged": stages["merged"] | {"adapter": "@v1.a"}}
    done = easyllm("run", write(recipe, stages=stages))
    assert done.returncode == 0, done.stderr


def test_removing_a_result_never_leaves_the_run_folder(tmp_path):
    from easyllm.pipeline.run import _prepare

    (tmp_path / "run").mkdir()
    with pytest.raises((EasyllmError, ValueError), match="stage name"):
        _prepare(None, tmp_path / "run" / "..", "key", None)
    assert (tmp_path / "run").is_dir()


def test_changed_settings_run_the_stage_and_those_that_use_it(recipe, tmp_path):
    assert easyllm("run", recipe).returncode == 0
    done = easyllm("run", recipe, "stages.before.max_tokens=3")
    assert done.returncode == 0, done.stderr
    assert skipped(done) == ["tune", "merged"]
    trained = (tmp_path / "run" / "tune" / "manifest.json").read_text()
    done = easyllm("run", recipe, "stages.before.max_tokens=3", "stages.tune.max_steps=2")
    assert done.returncode == 0, done.stderr
    assert skipped(done) == ["before"]
    assert (tmp_path / "run" / "tune.1" / "manifest.json").read_text() == trained
    stored = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["stages"]
    assert (stored["before"]["max_tokens"], stored["tune"]["max_steps"]) == (3, 2)


def test_an_added_stage_runs_alone(recipe):
    assert easyllm("run", recipe).returncode == 0
    stages = yaml.safe_load(recipe.read_text())["stages"]
    added = stages | {"after": stages["before"] | {"model": "@merged"}}
    done = easyllm("run", write(recipe, stages=added))
    assert done.returncode == 0, done.stderr
    assert skipped(done) == ["before", "tune", "merged"]


def test_an_unfinished_training_is_moved_aside_when_its_settings_change(recipe, tmp_path):
    assert easyllm("run", recipe).returncode == 0
    (tmp_path / "run" / "stages" / "tune.json").unlink()
    done = easyllm("run", recipe, "stages.tune.max_steps=2")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "tune.1" / "manifest.json").is_file()


def test_another_recipe_is_refused(recipe):
    assert easyllm("run", recipe).returncode == 0
    done = easyllm("run", recipe, "name=other")
    assert done.returncode == 2
    assert "contains another run (name is 'r' there and 'other' here)" in done.stderr


def test_a_stage_whose_result_was_deleted_runs_again(recipe, tmp_path):
    assert easyllm("run", recipe).returncode == 0
    for folder in ("merged", "tune"):
        shutil.rmtree(tmp_path / "run" / folder)
        done = easyllm("run", recipe)
        assert done.returncode == 0, done.stderr
        assert folder not in skipped(done)
        assert any((tmp_path / "run" / folder).iterdir())


def test_every_result_that_is_listed_exists(recipe):
    from easyllm.pipeline import load_recipe, run_recipe

    results = run_recipe(load_recipe(recipe, []))
    assert all(result.product.exists() for result in results.values())
    record = json.loads(results["before"].product.read_text())
    assert record["figures"]["rows"]["loss_nats"] > 0


@pytest.mark.parametrize("place", ["", "tune"])
def test_a_folder_that_another_run_uses_is_refused(recipe, tmp_path, place):
    assert easyllm("run", recipe).returncode == 0
    before = (tmp_path / "run" / "tune" / "manifest.json").read_text()
    with locked_folder(tmp_path / "run" / place):
        done = easyllm("run", recipe, "stages.tune.max_steps=2")
    assert done.returncode == 2
    assert "another process is using" in done.stderr
    assert (tmp_path / "run" / "tune" / "manifest.json").read_text() == before


def test_a_training_in_a_folder_in_use_is_refused(recipe, tmp_path):
    stage = yaml.safe_load(recipe.read_text())["stages"]["tune"]
    alone = tmp_path / "train.yaml"
    values = {key: value for key, value in stage.items() if key != "kind"}
    alone.write_text(yaml.safe_dump(values | {"output": str(tmp_path / "alone")}))
    with locked_folder(tmp_path / "alone"):
        done = easyllm("train", alone)
    assert done.returncode == 2
    assert "another process is using" in done.stderr
    assert not (tmp_path / "alone").exists()
