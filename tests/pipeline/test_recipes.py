"""Pipelines on a tiny model: skipped stages, resuming after a kill, and the summary."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from easyllm.pipeline.quickstart import run_quickstart
from easyllm.pipeline.recipe import find_recipe, load_train_recipe
from easyllm.train.metrics import read_metrics

FACTS = [("What is the colour of box one?", "It is red."), ("And of box two?", "It is blue.")]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_folder):
    """The quickstart's recipe, with the tiny model and little data."""
    folder = tmp_path_factory.mktemp("recipe")
    values = yaml.safe_load(find_recipe("quickstart").read_text())
    rows = [{"prompt": q, "completion": a} for q, a in FACTS]
    keyed = [row | {"key": row["completion"].split()[-1].strip(".")} for row in rows]
    for name, content in (("train", rows * 6), ("heldout", keyed), ("unrelated", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in content))
    for stage in values["stages"].values():
        if stage["model"] == "smollm2":
            stage["model"] = str(tiny_folder)
        if stage["kind"] == "evaluate":
            stage["data"] = {"heldout": "heldout.jsonl", "unrelated": "unrelated.jsonl"}
    values["stages"]["tune"] |= {
        "batch_size": 2,
        "epochs": 5,
        "save_every": 1,
        "data": {"train": ["train.jsonl"], "max_seq_len": 128},
    }
    path = folder / "quickstart.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def run(recipe, output, *words):
    command = [sys.executable, "-m", "easyllm", "run", str(recipe), f"output={output}", *words]
    return subprocess.run(command, capture_output=True, text=True)


def merged_bytes(output):
    return (output / "merged" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """A finished run."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    done = run(recipe, output)
    assert done.returncode == 0, done.stderr
    return output


def test_a_run_writes_its_recipe_its_stages_and_a_loadable_model(whole):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert yaml.safe_load((whole / "recipe.yaml").read_text())["name"] == "quickstart"
    assert {p.stem for p in (whole / "stages").glob("*.json")} == {
        "before",
        "tune",
        "merged",
        "after",
    }
    for file in ("recipe.yaml", "metrics.jsonl", "manifest.json", "adapter/adapter_config.json"):
        assert (whole / "tune" / file).is_file()
    model = AutoModelForCausalLM.from_pretrained(whole / "merged")
    tokenizer = AutoTokenizer.from_pretrained(whole / "merged")
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_training_lowers_the_loss(whole):
    losses = [line["train/loss_nats"] for line in read_metrics(whole / "tune")]
    assert losses[-1] < 0.5 * losses[0]


def test_a_second_run_skips_every_stage(recipe, whole):
    before = (whole / "merged" / "model.safetensors").stat().st_mtime_ns
    done = run(recipe, whole)
    assert done.returncode == 0
    assert done.stderr.count("skipped") == 4
    assert (whole / "merged" / "model.safetensors").stat().st_mtime_ns == before


def test_a_changed_input_reruns_the_stages_that_depend_on_it(recipe, whole, tmp_path):
    folder = tmp_path / "recipe"
    shutil.copytree(recipe.parent, folder)
    output = tmp_path / "run"
    values = yaml.safe_load((folder / recipe.name).read_text())
    assert run(folder / recipe.name, output).returncode == 0
    (folder / "unrelated.jsonl").write_text(json.dumps({"prompt": "x", "completion": "y"}) + "\n")
    done = run(folder / recipe.name, output)
    assert done.returncode == 0, done.stderr
    skipped = [
        line.split()[1].rstrip(":") for line in done.stderr.splitlines() if "skipped" in line
    ]
    assert skipped == ["tune", "merged"]
    assert values["stages"]
    trained = (output / "tune" / "manifest.json").read_text()
    (folder / "train.jsonl").write_text((recipe.parent / "train.jsonl").read_text() * 2)
    done = run(folder / recipe.name, output)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert f"the previous training is now in {output / 'tune.1'}" in said
    assert (output / "tune.1" / "manifest.json").read_text() == trained
    assert (output / "tune" / "manifest.json").read_text() != trained


def test_a_run_killed_in_training_resumes_to_the_same_weights(recipe, whole, tmp_path):
    output = tmp_path / "killed"
    command = [sys.executable, "-m", "easyllm", "run", str(recipe), f"output={output}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(read_metrics(output / "tune")) < 7 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert process.poll() is None, "finished before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = run(recipe, output)
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stderr
    assert merged_bytes(output) == merged_bytes(whole)


def test_the_folder_of_another_recipe_is_refused(recipe, whole):
    done = run(recipe, whole, "name=other")
    assert done.returncode == 2
    assert "contains another run (name is 'quickstart' there and 'other' here)" in done.stderr


def test_the_quickstart_summary_contains_its_figures(recipe, whole, monkeypatch):
    monkeypatch.setattr("easyllm.pipeline.quickstart.find_recipe", lambda name: recipe)
    result = run_quickstart([f"output={whole}"])
    summary = json.loads((whole / "summary.json").read_text())
    assert summary == json.loads(json.dumps(result.summary))
    assert summary["heldout_loss_nats"]["after"] < summary["heldout_loss_nats"]["before"]
    assert 0 <= summary["recall"]["before"] <= summary["recall"]["after"] <= 1
    assert summary["train_tokens_per_s"] > 0
    assert {"question", "before", "after"} == set(summary["answers"][0])
    assert (whole / "merged").samefile(summary["paths"]["model"])


def test_references_must_point_to_an_earlier_stage(recipe, tmp_path):
    done = run(recipe, tmp_path / "run", "stages.merged.adapter=@tun")
    assert done.returncode == 2
    assert "@tun" in done.stderr
    assert "did you mean 'tune'" in done.stderr
    assert not (tmp_path / "run").exists()


def test_files_that_an_objective_reads_are_relative_to_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe").mkdir()
    for name in ("chats.jsonl", "texts.jsonl"):
        (tmp_path / "recipe" / name).write_text(json.dumps({"text": "a"}) + "\n")
    base = {"model": "smollm2", "data": {"kind": "arithmetic"}, "output": "out"}
    rewards = [{"function": "exact"}]
    for objective, found in (
        ({"kind": "grpo", "warm_start": {"replay": ["chats.jsonl"]}}, "chats.jsonl"),
        ({"kind": "ppo", "pretraining": {"files": "texts.jsonl"}}, "texts.jsonl"),
    ):
        path = tmp_path / "recipe" / "train.yaml"
        path.write_text(yaml.safe_dump(base | {"objective": objective | {"rewards": rewards}}))
        config = load_train_recipe(path, [])
        part = getattr(config.objective, list(objective)[1])
        files = part.replay if objective["kind"] == "grpo" else part.files
        assert files == (str(tmp_path / "recipe" / found),)
