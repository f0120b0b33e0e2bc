"""A dry run refuses what the run refuses, prints the run's plan, and writes nothing."""

import json

import pytest
import yaml
from safetensors.torch import load_file, save_file

from easyllm.train.preflight import plan_run
from easyllm_command import easyllm


@pytest.fixture
def write(tiny_folder, tmp_path):
    """Writes a training recipe with some keys changed; returns its path."""

    def make(**changes):
        rows = tmp_path / "rows.jsonl"
        if not rows.exists():
            rows.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
        values = {
            "model": str(tiny_folder),
            "data": {"train": ["rows.jsonl"], "max_seq_len": 64},
            "max_steps": 1,
            "output": str(tmp_path / "run"),
        }
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(values | changes))
        return recipe

    return make


def scratch(folder, **config):
    return {"tokenizer": str(folder), "config": {"model_type": "llama", **config}}


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


def broken(folder, tmp_path):
    """Copies a checkpoint without one of its tensors."""
    copy = tmp_path / "broken"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    tensors = load_file(copy / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, copy / "model.safetensors")
    return str(copy)


MEASURED = ("flops_per_s", "seconds", "free_bytes", "process_bytes", "predicted_peak_bytes")
"""What a plan measures on the machine, so that it varies."""
WRONG = {
    "an unknown value of a fresh model": (
        lambda f, _: {"model": scratch(f, positional="alibi", **SIZES)},
        "'positional' is not a value of a model",
    ),
    "a fresh model that cannot be": (
        lambda f, _: {"model": scratch(f, **SIZES | {"num_key_value_heads": 3})},
        "the fresh model cannot be built",
    ),
    "a checkpoint that lacks a tensor": (
        lambda f, t: {"model": broken(f, t)},
        "model.norm.weight",
    ),
    "a missing file": (
        lambda *_: {"data": {"train": ["none.jsonl"], "max_seq_len": 64}},
        "none.jsonl",
    ),
    "an adapter without a target": (
        lambda *_: {"adapter": {"targets": ["q_prj"]}},
        "did you mean 'q_proj'?",
    ),
    "a rank no matrix has": (
        lambda *_: {"adapter": {"rank": 100_000_000}},
        "adapter.rank=100000000 is more than the rank of q_proj (64 x 32), which is at most 32",
    ),
    "a rank the narrowest matrix has not": (
        lambda *_: {"adapter": {"rank": 33, "targets": ["down_proj"]}},
        "of down_proj (32 x 64), which is at most 32; lower adapter.rank",
    ),
    "a group of no parameter": (
        lambda *_: {"parameter_groups": [{"pattern": "zzz"}]},
        "matches no trained parameter",
    ),
    "rows longer than the context": (
        lambda *_: {"data": {"train": ["rows.jsonl"], "max_seq_len": 999}},
        "longer than the model's context",
    ),
    "a prompt that leaves no space": (
        lambda *_: {"samples": {"prompts": ["a b c " * 300]}},
        "samples.prompts[0]",
    ),
    "no output": (lambda *_: {"output": None}, "sets no output folder"),
    "an unknown device": (lambda *_: {"device": "tpu9"}, "is not supported"),
}


@pytest.mark.parametrize("dry", [True, False], ids=["dry run", "run"])
@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG.keys())
def test_a_dry_run_refuses_what_the_run_refuses(write, tiny_folder, tmp_path, case, dry):
    changes, words = case
    recipe = write(**changes(tiny_folder, tmp_path))
    done = easyllm("train", recipe, *(["--dry-run"] if dry else []))
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_folder_with_another_run_is_refused(write, tmp_path):
    assert easyllm("train", write()).returncode == 0
    for words, message in (((), "finished"), (("seed=7",), "seed is 0 there and 7 here")):
        done = easyllm("train", write(), *words, "--dry-run")
        assert done.returncode == 2
        assert message in done.stderr


@pytest.mark.parametrize("changes", [{}, {"adapter": {"rank": 2}}, {"optimizer": {"kind": "muon"}}])
def test_the_plan_equals_the_runs(write, tmp_path, monkeypatch, changes):
    plans = []
    monkeypatch.setattr(
        "easyllm.train.preflight.plan_run",
        lambda *arguments: plans.append(plan_run(*arguments)) or plans[-1],
    )
    dry = easyllm("train", write(**changes), "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert not (tmp_path / "run").exists()
    assert plans[0].line() in dry.stderr
    assert yaml.safe_load(dry.stdout)["max_steps"] == 1
    as_json = json.loads(easyllm("train", write(**changes), "--dry-run", "--json").stdout)
    assert as_json["recipe"]["max_steps"] == 1
    assert easyllm("train", write(**changes)).returncode == 0
    first, second, run = (
        {k: v for k, v in plan.as_dict().items() if k not in MEASURED} for plan in plans
    )
    assert first == second == run
    assert first.items() <= as_json["plan"].items()
    assert isinstance(as_json["plan"]["memory_bytes"]["total"], int)
    assert as_json["plan"]["seconds"] >= 0


def test_a_dry_run_of_a_pipeline_plans_its_training_stages(write, tiny_folder, tmp_path):
    write()
    train = {
        "kind": "train",
        "model": str(tiny_folder),
        "data": {"train": [str(tmp_path / "rows.jsonl")], "max_seq_len": 64},
        "adapter": {"rank": 2},
    }
    recipe = tmp_path / "pipeline.yaml"
    values = {"name": "p", "output": str(tmp_path / "out"), "stages": {"tune": train}}
    recipe.write_text(yaml.safe_dump(values))
    done = easyllm("run", recipe, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["plans"]["tune"]["trained_parameters"] > 0
    done = easyllm("run", recipe, "--dry-run", "stages.tune.adapter.rank=99")
    assert done.returncode == 2
    assert "adapter.rank=99 is more than the rank of" in done.stderr
    done = easyllm("run", recipe, "--dry-run", "stages.tune.data.train=[none.jsonl]")
    assert done.returncode == 2
    assert "none.jsonl" in done.stderr
    assert not (tmp_path / "out").exists()
