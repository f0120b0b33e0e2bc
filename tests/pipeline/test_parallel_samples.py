"""Evaluation and generation in the middle of a divided run: those of one process."""

import json

import pytest

from easyllm.train.metrics import read_metrics
from stage_runs import run_stages, stage

LAYOUTS = {
    "zero2": {"layout": "zero2"},
    "zero3": {"layout": "zero3"},
    "fsdp": {"layout": "fsdp"},
    "tensor": {"tensor": 2},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("samples")
    rows = [{"prompt": text[:3], "completion": text} for text in ("hello", "what is it", "dog")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model": str(tiny_folder),
        "data": {
            "train": [str(folder / "rows.jsonl")],
            "eval": [str(folder / "rows.jsonl")],
            "max_seq_len": 64,
        },
        "optimizer": {"kind": "adamw", "learning_rate": 1e-2},
        "batch_size": 3,
        "micro_batch_tokens": 64,
        "max_steps": 4,
        "epochs": 50,
        "precision": "fp32",
        "save_every": 0,
        "eval_every": 2,
        "samples": {"prompts": ["wha", "do"], "max_tokens": 8},
    }
    stages = {"one": stage(values, folder / "one", 1)}
    stages |= {name: stage(values, folder / name, 2, ways) for name, ways in LAYOUTS.items()}
    ends, errors = run_stages(folder, stages)
    for name, end in ends.items():
        assert set(end["codes"]) == {0}, (name, errors)
    return {name: read_metrics(folder / name) for name in stages}


def column(metrics, key):
    return [each[key] for each in metrics if key in each]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_divided_model_evaluates_and_generates_as_a_whole_one(runs, layout):
    one, divided = runs["one"], runs[layout]
    losses = column(one, "eval/loss_nats")
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert column(divided, "eval/loss_nats") == pytest.approx(losses, abs=1e-5)
    samples = column(one, "samples")
    assert len(samples) == 2
    assert samples[0] != samples[1]  # the weights have changed in between
    assert column(divided, "samples") == samples
