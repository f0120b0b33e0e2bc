"""Checkpoints: which are kept, and their content."""

import torch
from torch import nn

from easyllm.batches.loader import Loader
from easyllm.examples.sample import Sample
from easyllm.train.config import AdamWConfig
from easyllm.train.loop import note_loss
from easyllm.train.optim import MasterOptimizer
from easyllm.train.state import TENSORS, RunState, Totals, checkpoints, load_newest, save_step


def state_of(step=0):
    parameters = {"weight": nn.Parameter(torch.zeros(4, 4))}
    loader = Loader([Sample.from_mask((1, 2, 3))], batch_size=1, micro_batch_tokens=8, seed=0)
    optimizer = MasterOptimizer(parameters, AdamWConfig())
    return RunState(optimizer, loader, Totals(step=step), {"model": "m"})


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
    assert (found, len(messages), state.totals.step) == (False, 1, 0)
    save_step(tmp_path, state_of(75), keep_last=1)
    assert names(tmp_path) == ["step-000075"]
    assert load_newest(tmp_path, state) == (True, [])
    assert state.totals.step == 75


def test_counters_and_the_typical_loss_are_restored(tmp_path):
    state = state_of(3)
    state.totals.skipped_in_a_row = 2
    note_loss(state.totals, 1.5)
    save_step(tmp_path, state, keep_last=1)
    again = state_of()
    load_newest(tmp_path, again)
    assert again.totals == state.totals
