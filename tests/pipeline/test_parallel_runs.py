"""Whole runs in two processes: results, checkpoints, resumption, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from easyllm.cli.main import app
from easyllm.cli.ranks import without_flags
from easyllm.core.errors import ConfigError
from easyllm.core.yaml_text import dump_yaml
from easyllm.train import Callback, TrainConfig, train
from easyllm.train.division import check_division
from easyllm.train.metrics import read_metrics


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("parallel")
    texts = ["hello", "what is it", "0123456789 " * 3, "good morning " * 2, "dog", "fox " * 6]
    rows = [{"prompt": text[:3], "completion": text} for text in texts]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig.model_validate(
        {
            "model": str(tiny_folder),
            "data": {"train": [str(file)], "eval": [str(file)], "max_seq_len": 64},
            "optimizer": {"kind": "adamw", "learning_rate": 1e-3},
            "batch_size": 3,
            "micro_batch_tokens": 64,
            "max_steps": 8,
            "epochs": 50,
            "precision": "fp32",
            "save_every": 2,
        }
    )
    (folder / "recipe.yaml").write_text(dump_yaml(config))
    return folder, config


def command(folder, output, *words):
    return [
        *(sys.executable, "-m", "easyllm", "train", str(folder / "recipe.yaml")),
        *(f"output={output}", *words, "--nproc", "2"),
    ]


def run(folder, output, *words):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(folder, output, *words), capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done


def weights(output):
    return load_file(output / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def one(recipe):
    folder, config = recipe
    train(config, folder / "one")
    return folder / "one"


@pytest.fixture(scope="module")
def sharded(recipe):
    """A run under ZeRO-2 that is killed after its second checkpoint, and resumed."""
    folder, _ = recipe
    output = folder / "zero2"
    words = ("parallel.layout=zero2", "max_steps=400")
    process = subprocess.Popen(
        command(folder, output, *words, "schedule.kind=constant"),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 900
    while not (output / "checkpoints" / "step-000004").is_dir():
        assert process.poll() is None, "the run ended before its second checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return output


def losses(output):
    return [m["train/loss_nats"] for m in read_metrics(output) if "train/loss_nats" in m]


def test_two_processes_learn_what_one_does(recipe, one):
    folder, _ = recipe
    done = run(folder, folder / "fsdp", "parallel.layout=fsdp", "--json")
    figures = json.loads(done.stdout)
    assert figures["steps"] == 8
    assert losses(folder / "fsdp") == pytest.approx(losses(one), abs=1e-5)
    mine, theirs = weights(folder / "fsdp"), weights(one)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, atol=1e-4, rtol=1e-3)
    files = sorted(
        path.name for path in (folder / "fsdp" / "checkpoints" / "step-000008").iterdir()
    )
    assert files == [
        "state-00000-of-00002.safetensors", "state-00001-of-00002.safetensors", "state.json",
    ]  # fmt: skip


def test_one_process_resumes_the_checkpoint_of_two(recipe, sharded):
    folder, config = recipe
    reference = folder / "reference"
    schedule = {"kind": "constant", "warmup_ratio": config.schedule.warmup_ratio}
    constant = config.model_dump() | {"schedule": schedule, "max_steps": 400}
    from_parts = TrainConfig.model_validate(constant)
    state = json.loads(sorted((sharded / "checkpoints").glob("step-*/state.json"))[-1].read_text())
    step = state["totals"]["step"]

    class StopSoon(Callback):
        def after_step(self, run, report):
            if report.step >= step + 2:
                run.progress.stopped = "enough"

    train(from_parts, sharded, callbacks=[StopSoon()])
    train(from_parts, reference, callbacks=[StopSoon()])
    resumed, plain = losses(sharded), losses(reference)
    assert len(resumed) == len(plain) == step + 2
    assert resumed == pytest.approx(plain, abs=1e-5)


def test_the_flag_of_the_launcher_is_not_passed_on():
    assert without_flags(["train", "x", "--nproc", "2", "a=1"]) == ["train", "x", "a=1"]
    assert without_flags(["train", "--nproc=2", "x"]) == ["train", "x"]
    words = ["train", "x", "--restarts", "3", "--nproc", "3", "--json"]
    assert without_flags(words) == ["train", "x", "--json"]
    assert without_flags(["train", "x", "--restarts=2"]) == ["train", "x"]


def test_a_degree_without_processes_is_refused(recipe):
    folder, _ = recipe
    done = CliRunner().invoke(
        app, ["train", str(folder / "recipe.yaml"), "output=never", "parallel.tensor=2"]
    )
    assert isinstance(done.exception, ConfigError)
    assert "parallel.tensor=2 does not divide the 1 processes" in str(done.exception)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"optimizer": {"kind": "muon"}}, "needs whole matrices"),
        ({"optimizer": {"kind": "adamw", "state": "int8"}}, "blocks of whole weights"),
        ({"optimizer": {"kind": "adamw", "paged": True}}, "whole moments in a file"),
    ],
)
def test_what_shards_cannot_train_names_the_layout_that_can(recipe, changes, part):
    _, config = recipe
    values = config.model_dump() | changes | {"parallel": {"layout": "zero1"}}
    with pytest.raises(ConfigError, match=rf"{part}.*set parallel.layout=ddp"):
        check_division(TrainConfig.model_validate(values), None)


def test_contradictions_in_the_recipe_are_refused(recipe):
    _, config = recipe
    for parallel, part in (
        ({"sequence": True}, "parallel.tensor=1"),
        ({"offload": True}, "set parallel.layout to zero3 or fsdp"),
    ):
        with pytest.raises(ValueError, match=part):
            TrainConfig.model_validate(config.model_dump() | {"parallel": parallel})
