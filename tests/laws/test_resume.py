"""Law 5: a run that is killed and resumed ends bitwise identical to an uninterrupted one."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from easyllm.corpus.shards import write_shards
from easyllm.train.metrics import read_metrics
from easyllm.train.state import checkpoints
from tiny_models import CORPUS, tiny_config

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
def test_a_killed_run_resumes_bitwise_exactly(recipe, tmp_path, mode):
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


ZYGOTE = """
import os, signal, sys, time
from pathlib import Path
import torch
from easyllm.core.yaml_text import read_yaml
from easyllm.train import TrainConfig, train
torch.set_num_threads(1)
for line in sys.stdin:  # "recipe output seconds": a run to be killed after that time, or never
    recipe, output, seconds = line.split()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            train(TrainConfig.model_validate(read_yaml(Path(recipe))), Path(output))
        except BaseException as error:
            print(error, flush=True)
        os._exit(0)
    if float(seconds) >= 0:
        while not (Path(output) / "metrics.jsonl").exists():
            time.sleep(0.002)
        time.sleep(float(seconds))
        os.kill(child, signal.SIGKILL)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def runs():
    """Starts runs by forking a process that has already imported torch, and kills them."""
    command = [sys.executable, "-c", ZYGOTE]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def run(recipe, output, killed_after=-1.0):
            process.stdin.write(f"{recipe} {output} {killed_after}\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        yield run
        process.stdin.close()


@pytest.fixture(scope="module")
def recipes(recipe, tmp_path_factory, tiny_folder, tiny_tokenizer):
    """Fine-tuning with dropout and mixed lengths; pretraining on packed shard rows with Muon."""
    folder = tmp_path_factory.mktemp("kills")
    generator = random.Random(0)
    documents = [
        [generator.randrange(3, 320) for _ in range(generator.randrange(1, 60))] for _ in range(150)
    ]
    write_shards(folder / "shards", documents, tiny_tokenizer, shard_tokens=500)
    tuning = yaml.safe_load(recipe.read_text(encoding="utf-8")) | {"epochs": 12, "dropout": 0.1}
    pretraining = {
        "model": {
            "tokenizer": str(tiny_folder),
            "config": tiny_config(num_hidden_layers=3),
            "max_seq_len": 64,
        },
        "data": {"kind": "corpus", "shards": str(folder / "shards"), "max_seq_len": 48},
        "optimizer": {"kind": "muon", "learning_rate": 1e-2},
        "batch_size": 3,
        "micro_batch_tokens": 96,
        "epochs": 2,
        "dropout": 0.1,
        "save_every": 1,
    }
    for name, values in (("tuning", tuning), ("pretraining", pretraining)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["tuning", "pretraining"])
def test_ten_kills_at_random_moments_do_not_change_a_bit(name, recipes, runs, tmp_path):
    recipe, whole, broken = recipes / f"{name}.yaml", tmp_path / "whole", tmp_path / "broken"
    start = time.monotonic()
    assert runs(recipe, whole) == 0
    seconds = time.monotonic() - start
    generator = random.Random(name)
    kills = 0
    while kills < 10:
        status = runs(recipe, broken, generator.uniform(0, seconds / 8))
        if status == 0:  # it finished before the kill: start over
            assert weights(broken) == weights(whole)
            shutil.rmtree(broken)
            continue
        assert status == signal.SIGKILL
        kills += 1
        seen = figures(broken)
        assert seen == figures(whole)[: len(seen)]
    assert runs(recipe, broken) == 0
    assert weights(broken) == weights(whole)
    assert figures(broken) == figures(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint(recipe, tmp_path, number):
    output, whole = tmp_path / "run", tmp_path / "whole"
    finish(start(recipe, whole))
    process = start(recipe, output, "save_every=1000")
    deadline = time.monotonic() + 120
    while len(figures(output)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert re.search(r"interrupted after step \d+ of \d+; run the same command to resume", err)
    assert "error:" not in err
    assert len(checkpoints(output)) == 1
    finish(start(recipe, output, "save_every=1000"))
    assert weights(output) == weights(whole)


def test_a_run_resumes_with_changed_harmless_values_if_allowed(recipe, tmp_path):
    output = tmp_path / "run"
    finish(start(recipe, output))
    (output / "manifest.json").unlink()
    process = start(recipe, output, "log_every=5")
    assert "log_every is 1 there and 5 here" in process.communicate()[1]
    finish(start(recipe, output, "log_every=5", "--allow-change"))
    (output / "manifest.json").unlink()
    process = start(recipe, output, "log_every=5", "seed=1", "--allow-change")
    assert "seed is 0 there and 1 here" in process.communicate()[1]


def test_a_checkpoint_of_different_data_is_refused(recipe, tmp_path):
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    data = tmp_path / "rows.jsonl"
    shutil.copy(values["data"]["train"][0], data)
    words = [f"data.train=[{data}]"]
    output = tmp_path / "run"
    finish(start(recipe, output, *words))
    (output / "manifest.json").unlink()
    with data.open("a", encoding="utf-8") as file:
        file.write('{"prompt": "one more", "completion": "row"}\n')
    process = start(recipe, output, *words)
    _, err = process.communicate()
    assert process.returncode == 2
    assert "was created with another data" in err


def test_a_damaged_checkpoint_is_skipped_with_a_message(recipe, tmp_path):
    output, whole = tmp_path / "run", tmp_path / "whole"
    finish(start(recipe, whole, "keep_last=2"))
    shutil.copytree(whole, output)
    (output / "manifest.json").unlink()
    newest = checkpoints(output)[-1] / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    _, err = finish(start(recipe, output, "keep_last=2"))
    assert "damaged and was skipped" in err
    assert f"resumed at step {STEPS - 1}" in err
    assert weights(output) == weights(whole)


def test_a_folder_with_another_run_is_refused(recipe, tmp_path):
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
