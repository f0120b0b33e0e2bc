"""Checkpoints: which are kept, and their content."""

import dataclasses
import json

import torch
from torch import nn

from easyllm.batches.loader import Loader
from easyllm.examples.sample import Sample
from easyllm.train.config import AdamWConfig
from easyllm.train.loss_scaler import LossScaler
from easyllm.train.optim import MasterOptimizer
from easyllm.train.progress import TrainProgress
from easyllm.train.state import STATE, TENSORS, RunState, checkpoints, load_newest, save_step


def state_of(step=0):
    parameters = {"weight": nn.Parameter(torch.zeros(4, 4))}
    loader = Loader([Sample.from_mask((1, 2, 3))], batch_size=1, micro_batch_tokens=8, seed=0)
    optimizer = MasterOptimizer(parameters, AdamWConfig())
    return RunState(optimizer, loader, TrainProgress(step=step), {"model": "m"})


def names(run):
    return [path.name for path in checkpoints(run)]


def test_the_oldest_checkpoints_are_deleted(tmp_path):
    for step in (2, 4, 6):
        save_step(tmp_path, state_of(step), keep_last=2)
    assert names(tmp_path) == ["step-000004", "step-000006"]


def test_a_damaged_checkpoint_of_a_later_step_does_not_displace_the_new_one(tmp_path):
    save_step(tmp_path, state_of(100), keep_last=1)
    file = checkpoints(tmp_path)[0] / TENSORS
    file.write_bytes(file.read_bytes()[:50])
    state = state_of()
    found, messages = load_newest(tmp_path, state)
    assert (found, len(messages), state.progress.step) == (False, 1, 0)
    save_step(tmp_path, state_of(75), keep_last=1)
    assert names(tmp_path) == ["step-000075"]
    assert load_newest(tmp_path, state) == (True, [])
    assert state.progress.step == 75


def test_counters_and_the_typical_loss_are_restored(tmp_path):
    state = state_of(3)
    state.progress.skipped_in_a_row = 2
    state.progress.best_loss_nats, state.progress.best_step = 1.25, 2
    state.progress.patience_used, state.progress.stopped = 3, "no improvement"
    state.progress.note_loss(1.5)
    save_step(tmp_path, state, keep_last=1)
    again = state_of()
    load_newest(tmp_path, again)
    assert again.progress == state.progress


def test_a_checkpoint_has_the_keys_of_earlier_versions(tmp_path):
    """Runs that earlier versions have started can be resumed, and the other way around."""
    state = state_of(3)
    save_step(tmp_path, state, keep_last=1)
    file = checkpoints(tmp_path)[0] / STATE
    stored = json.loads(file.read_text())
    assert list(stored) == ["totals", "loader", "identity", "extra"]
    counters = "step tokens trained_tokens skipped skipped_in_a_row usual_loss_nats usual_steps"
    assert list(stored["totals"]) == counters.split()
    assert stored["extra"] == {}
    stored["extra"] = {
        "best_loss_nats": 1.5,
        "best_step": 2,
        "stopping_loss_nats": 1.5,
        "patience_used": 1,
        "stopped": "enough",
        "loss_scaler": None,
    }
    file.write_text(json.dumps(stored))
    load_newest(tmp_path, state)
    progress = state.progress
    assert (progress.best_loss_nats, progress.best_step) == (1.5, 2)
    assert (progress.stopping_loss_nats, progress.patience_used) == (1.5, 1)
    assert progress.stopped == "enough"


def test_the_loss_scaler_is_restored(tmp_path):
    state = dataclasses.replace(state_of(3), scaler=LossScaler(initial_scale=8.0))
    save_step(tmp_path, state, keep_last=1)
    again = dataclasses.replace(state_of(), scaler=LossScaler())
    load_newest(tmp_path, again)
    assert again.scaler.state() == state.scaler.state()
