"""Law 5: a run killed and resumed ends bit by bit where an undisturbed one does."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from conftest import CORPUS
from easyllm.train.metrics import read_metrics
from easyllm.train.state import checkpoints

STEPS = 24


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("resume")
    rows = [
        {"prompt": f"{line} {i}", "completion": line[: 10 + i]}
        for i in range(3)
        for line in dict.fromkeys(CORPUS)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = folder / "recipe.yaml"
    values = {
        "model": str(tiny_folder),
        "data": {"train": [str(data)], "max_seq_len": 128},
        "adapter": {"kind": "lora", "rank": 4, "dropout": 0.1},
        "optimizer": {"kind": "adamw", "learning_rate": 1e-2},
        "batch_size": 3,
        "micro_batch_tokens": 128,
        "epochs": 6,
        "save_every": 1,
    }
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def start(recipe, output, *words):
    command = [sys.executable, "-m", "easyllm", "train", str(recipe), f"output={output}", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


def weights(output):
    folder = output / "adapter" if (output / "adapter").exists() else output / "model"
    (file,) = folder.glob("*.safetensors")
    return file.read_bytes()


def figures(output):
    return [
        (line["step"], line["train/loss_nats"], line["train/grad_norm"])
        for line in read_metrics(output)
        if "train/loss_nats" in line
    ]


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_killed_run_resumes_to_the_same_bits(recipe, tmp_path, mode):
    words = [] if mode == "lora" else ["adapter=null"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start(recipe, whole, *words))
    assert len(figures(whole)) == STEPS
    kills = 0
    for step in sorted(random.Random(mode).sample(range(1, STEPS - 2), 2)):
        process = start(recipe, broken, *words)
        deadline = time.monotonic() + 120
        while len(figures(broken)) < step and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
    _, err = finish(start(recipe, broken, *words)) if not done(broken) else ("", "resumed")
    assert kills
    assert "resumed" in err
    assert weights(broken) == weights(whole)
    assert figures(broken) == figures(whole)


def done(output):
    return (output / "manifest.json").exists()


def test_a_damaged_checkpoint_is_passed_over_with_a_message(recipe, tmp_path):
    output, whole = tmp_path / "run", tmp_path / "whole"
    finish(start(recipe, whole, "keep_last=2"))
    shutil.copytree(whole, output)
    (output / "manifest.json").unlink()
    newest = checkpoints(output)[-1] / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    _, err = finish(start(recipe, output, "keep_last=2"))
    assert "damaged and passed over" in err
    assert f"resumed at step {STEPS - 1}" in err
    assert weights(output) == weights(whole)


def test_another_run_in_the_folder_is_refused(recipe, tmp_path):
    output = tmp_path / "run"
    finish(start(recipe, output))
    for words, reason in (
        (["optimizer.learning_rate=1e-3"], "learning_rate is 0.01 there and 0.001 here"),
        ([], "finished"),
    ):
        process = start(recipe, output, *words)
        _, err = process.communicate()
        assert process.returncode == 2
        assert reason in err
