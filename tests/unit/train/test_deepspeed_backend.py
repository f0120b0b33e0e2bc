"""The backend `deepspeed` of a recipe: the file that the engine gets, and what is refused."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from easyllm.core.config import validate
from easyllm.core.errors import ConfigError
from easyllm.parallel.deepspeed_config import read_deepspeed
from easyllm.parallel.deepspeed_engine import load_deepspeed
from easyllm.train import TrainConfig
from easyllm.train.deepspeed import engine_keys, recipe_values, table, with_deepspeed
from easyllm.train.deepspeed_backend import check_backend, engine_values
from easyllm.train.metrics import read_metrics

CPU = torch.device("cpu")
FILE = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "Adam",
        "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True},
    },
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}},
    "activation_checkpointing": {"partition_activations": True},
    "zero_optimization": {
        "stage": "3",
        "overlap_comm": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
    },
}


def recipe(folder, file=FILE, **changes):
    path = folder / "ds_config.json"
    path.write_text(json.dumps(file))
    values = {
        "data": {"train": ["rows.jsonl"], "max_seq_len": 64},
        "batch_size": 12,
        "micro_batch_tokens": 128,
        "clip_norm": 0.25,
        "precision": "fp32",
        "optimizer": {"kind": "adamw", "learning_rate": 0.01, "weight_decay": 0.1},
        "save_every": 0,
        "deepspeed": str(path),
        "backend": "deepspeed",
    }
    return TrainConfig.model_validate(values | changes)


def values_of(config, world=2):
    config = with_deepspeed(config, world, quiet=True)
    settings = read_deepspeed(json.loads(json.dumps(FILE)), recipe_values(config, world, 32))
    return engine_values(FILE, settings, config, CPU)


def test_the_engine_gets_a_file_without_auto(tmp_path):
    values = values_of(recipe(tmp_path))
    assert "auto" not in json.dumps(values)
    assert values["train_batch_size"] == 12
    sizes = values["train_micro_batch_size_per_gpu"], values["gradient_accumulation_steps"]
    assert sizes[0] * sizes[1] * 2 == 12
    assert values["zero_optimization"] == {
        "stage": 3,
        "overlap_comm": True,
        "reduce_bucket_size": 32 * 32,
        "stage3_prefetch_bucket_size": int(0.9 * 32 * 32),
    }


def test_the_recipe_s_clipping_is_written_because_deepspeed_clips_at_1_without_it(tmp_path):
    assert "gradient_clipping" not in FILE
    assert values_of(recipe(tmp_path))["gradient_clipping"] == 0.25
    assert values_of(recipe(tmp_path, clip_norm=None))["gradient_clipping"] == 0.0


def test_type_and_options_of_the_file_s_optimizer_stay(tmp_path):
    section = values_of(recipe(tmp_path))["optimizer"]
    assert section["type"] == "Adam"
    assert section["params"] == {
        "lr": 0.01,
        "weight_decay": 0.1,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "torch_adam": True,
    }


def test_the_run_s_schedule_and_recomputation_replace_the_engine_s(tmp_path):
    values = values_of(recipe(tmp_path))
    assert "scheduler" not in values
    assert "activation_checkpointing" not in values
    config = with_deepspeed(recipe(tmp_path), 2, quiet=True)
    assert (config.schedule.kind, config.schedule.warmup_steps) == ("constant", 5)


def test_the_table_says_what_the_engine_does_itself(tmp_path):
    config = recipe(tmp_path)
    keys = read_deepspeed(FILE, recipe_values(config, 2)).keys
    ours = {each.key: each.fate for each in keys}
    theirs = {each.key: each.fate for each in engine_keys(keys)}
    assert ours["zero_optimization.overlap_comm"] == "ignored"
    assert theirs["zero_optimization.overlap_comm"] == "honoured"
    assert (ours["zero_optimization.stage"], theirs["zero_optimization.stage"]) == (
        "mapped",
        "honoured",
    )
    assert theirs["activation_checkpointing"] == "ignored"
    assert theirs["scheduler.type"] == "mapped"
    assert len(table(engine_keys(keys))) == len(keys)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"objective": {"kind": "dpo"}, "data": {"kind": "preferences"}}, "objective.kind=dpo"),
        ({"quantize": "nf4", "adapter": {"kind": "lora"}}, "quantize=nf4"),
        ({"parallel": {"tensor": 2}}, "parallel.tensor=2"),
        ({"precision": "fp16"}, "precision=fp16"),
        ({"optimizer": {"kind": "muon"}}, "optimizer.kind=muon"),
        ({"optimizer": {"kind": "adamw", "state": "int8"}}, "optimizer.state=int8"),
        ({"optimizer": {"kind": "adamw", "paged": True}}, "optimizer.paged=true"),
        ({"compile": True}, "compile=true"),
        ({"checkpoint_activations": "full"}, "checkpoint_activations=full"),
        ({"samples": {"prompts": ["a"]}}, "samples"),
        ({"retention": ["file.jsonl"]}, "retention"),
        ({"keep_best": True, "eval_every": 2}, "keep_best=true"),
        ({"save_every": 50}, "save_every=0"),
    ],
)
def test_what_the_engine_does_not_train_is_refused_with_the_backend_that_does(
    tmp_path, changes, part
):
    if "data" in changes:
        changes["data"] |= {"train": ["rows.jsonl"], "max_seq_len": 64}
    config = recipe(tmp_path, **changes)
    with pytest.raises(ConfigError, match="set backend=torch") as error:
        check_backend(config, 2)
    assert part in str(error.value)
    check_backend(config.model_copy(update={"backend": "torch"}), 2)


def test_a_single_process_is_refused_and_a_plan_is_not(tmp_path):
    with pytest.raises(ConfigError, match="add --nproc 2"):
        check_backend(recipe(tmp_path), 1)
    check_backend(recipe(tmp_path), 0)
    check_backend(recipe(tmp_path), 2)


def test_the_backend_needs_its_file():
    with pytest.raises(ConfigError, match=r"deepspeed=ds_config\.json"):
        validate(TrainConfig, {"data": {"train": ["a.jsonl"]}, "backend": "deepspeed"}, source="r")


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_the_extra_is_named_if_deepspeed_is_missing():
    with pytest.raises(ConfigError, match=r"\.\[deepspeed\]"):
        load_deepspeed(CPU)


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [0, 3])
def test_the_engine_learns_what_this_package_does(tmp_path, tiny_folder, stage):
    """The whole comparison is `make interop NAME=deepspeed`."""
    pytest.importorskip("deepspeed")
    rows = [{"prompt": "a", "completion": text} for text in ("hello", "what is it", "dog" * 9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    changes = {
        "model": str(tiny_folder),
        "data": {"train": [str(tmp_path / "rows.jsonl")], "max_seq_len": 64},
        "batch_size": 4,
        "max_steps": 4,
        "epochs": 9,
    }
    config = recipe(tmp_path, file | {"zero_optimization": {"stage": stage}}, **changes)
    written = config.model_dump(mode="json", exclude_unset=True)
    (tmp_path / "recipe.yaml").write_text(json.dumps(written))
    losses = []
    for backend in ("torch", "deepspeed"):
        output = tmp_path / backend
        line = [sys.executable, "-m", "easyllm", "train", str(tmp_path / "recipe.yaml")]
        line += [f"output={output}", f"backend={backend}", "--nproc", "2"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        metrics = read_metrics(output)
        losses.append([m["train/loss_nats"] for m in metrics if "train/loss_nats" in m])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
