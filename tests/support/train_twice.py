"""Training runs of a few steps: uninterrupted, and killed and resumed."""

import pytest

from easyllm.train import Callback, TrainConfig, train
from easyllm.train.metrics import read_metrics


def run_config(rows, base, **changes):
    values = {
        "model": str(base),
        "data": {"train": [str(rows / "tune.jsonl")], "max_seq_len": 64},
        "optimizer": {"learning_rate": 3e-2},
        "batch_size": 8,  # all rows in every step
        "micro_batch_tokens": 64,
        "max_steps": 5,
        "epochs": 9,
        "precision": "fp32",
        "save_every": 1,
    }
    return TrainConfig.model_validate(values | changes)


def losses(output):
    return [line["train/loss_nats"] for line in read_metrics(output) if "train/loss_nats" in line]


class Killed(Exception):
    pass


class KillAfterTwoSteps(Callback):
    """Fails in step three, so that step two is the newest checkpoint."""

    def after_backward(self, run, info):
        if info.step == 2:
            raise Killed


def train_twice(config, tmp_path):
    """Trains uninterrupted, and with a crash after step two and a resume: bitwise equal."""
    train(config, tmp_path / "whole")
    with pytest.raises(Killed):
        train(config, tmp_path / "broken", callbacks=[KillAfterTwoSteps()])
    train(config, tmp_path / "broken")
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    part = "adapter" if config.adapter is not None else "model"
    files = [next((tmp_path / run / part).glob("*.safetensors")) for run in ("whole", "broken")]
    assert files[0].read_bytes() == files[1].read_bytes()
    found = losses(tmp_path / "whole")
    assert found[-1] < found[0]
    return tmp_path / "whole" / part
