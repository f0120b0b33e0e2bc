"""A training run's newest checkpoint is served while the run goes on."""

import json
import shutil
import time

import httpx
import pytest
import torch

from easyllm.core.errors import ConfigError
from easyllm.engine import LLM, SamplingParams
from easyllm.serve import watch
from easyllm.serve.watch import WatchedRun
from easyllm.train import train
from easyllm.train.checkpoint_model import CheckpointModel
from running_server import QUESTION, running
from train_twice import run_config

ASK = {"model": "run", "messages": QUESTION, "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file of a few conversations, for training and evaluation."""
    folder = tmp_path_factory.mktemp("rows")
    lines = [{"prompt": f"{n} plus one", "completion": f"is {n + 1}"} for n in range(8)]
    (folder / "tune.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def config(rows, base, **changes):
    data = {"train": [str(rows / "tune.jsonl")], "eval": [str(rows / "tune.jsonl")]}
    changes = {"data": data | {"max_seq_len": 64}, "eval_every": 1, "keep_last": 9} | changes
    return run_config(rows, base, **changes)


@pytest.mark.parametrize("adapter", [None, {"kind": "lora", "rank": 4}], ids=["whole", "lora"])
def test_a_checkpoint_answers_as_the_run_ends_with(rows, tiny_folder, tmp_path, adapter):
    run = tmp_path / "run"
    train(config(rows, tiny_folder, adapter=adapter), run)
    result = LLM(run / ("model" if adapter is None else "adapter"))
    watched = WatchedRun(run, {"page_size": 8})
    assert watched.step == 5
    assert "eval/loss_nats" in watched.scores
    params = SamplingParams(temperature=0, max_tokens=8)
    same = [llm.generate(["4 plus one"], params)[0].token_ids for llm in (result, watched.llm)]
    assert same[0] == same[1]


def test_each_new_checkpoint_is_served_with_its_scores(rows, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "EVERY_S", 0.02)
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(config(rows, tiny_folder), whole)
    run.mkdir()
    for name in ("recipe.yaml", "metrics.jsonl"):
        shutil.copy(whole / name, run / name)

    def add(step):
        name = f"checkpoints/step-{step:06d}"
        shutil.copytree(whole / name, run / f"{name}.tmp")
        (run / f"{name}.tmp").rename(run / name)

    watched = WatchedRun(run)
    assert watched.step == 0
    with running({"run": watched.llm}, watched={"run": watched}) as address:
        texts = []
        for step in (0, 2, 5):
            if step:
                add(step)
            deadline = time.monotonic() + 60
            while (entry := httpx.get(f"{address}/v1/models/run").json())["step"] != step:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            answer = httpx.post(f"{address}/v1/chat/completions", json=ASK, timeout=60).json()
            texts.append((entry["scores"], answer["choices"][0]["message"]["content"]))
    losses = [scores.get("eval/loss_nats") for scores, _ in texts]
    assert losses[0] != losses[1] != losses[2]
    assert len({text for _, text in texts}) == 3
    final = WatchedRun(run).llm.generate(["4"], SamplingParams(temperature=0, max_tokens=4))
    again = watched.llm.generate(["4"], SamplingParams(temperature=0, max_tokens=4))
    assert final[0].token_ids == again[0].token_ids


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"not the folder of a training run.*recipe\.yaml"):
        WatchedRun(tmp_path)


def test_a_damaged_newest_checkpoint_counts_as_none(rows, tiny_folder, tmp_path):
    run = tmp_path / "run"
    train(config(rows, tiny_folder), run)
    (run / "checkpoints/step-000005/state.safetensors").write_bytes(b"cut")
    found = CheckpointModel.open(run)
    before = torch.cat([p.flatten() for p in found.model.parameters()])
    step, weights = found.newer()
    assert step == 4
    found.load(step, weights)
    assert found.newer() is None
    assert not torch.equal(before, torch.cat([p.flatten() for p in found.model.parameters()]))
