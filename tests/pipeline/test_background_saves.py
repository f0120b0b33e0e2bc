"""Checkpoints that a thread writes: the same bits, one at a time, errors that end the run."""

import errno
import json
import os
import threading
import time

import pytest
from safetensors.torch import load_file

from easyllm.core.errors import EasyllmError
from easyllm.train import Callback, TrainConfig, background_save, train
from easyllm.train.state import checkpoints
from stage_runs import losses, run_stages, stage

STEPS = 8


@pytest.fixture(scope="module")
def values(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("background")
    texts = ["hello", "what is it", "0123456789 " * 3, "good morning " * 2, "dog", "fox " * 6]
    rows = [{"prompt": text[:3], "completion": text} for text in texts]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": str(tiny_folder),
        "data": {"train": [str(folder / "rows.jsonl")], "max_seq_len": 64},
        "optimizer": {"kind": "adamw", "learning_rate": 1e-2},
        "batch_size": 4,
        "micro_batch_tokens": 64,
        "max_steps": STEPS,
        "epochs": 50,
        "precision": "fp32",
        "dropout": 0.1,
        "save_every": 2,
        "keep_last": 10,
    }


def run(values, output, *callbacks, **changes):
    train(TrainConfig.model_validate(values | changes), output, callbacks=callbacks)
    return output


class Break(Callback):
    """Ends a run with an error, as a failing machine would."""

    def __init__(self, step):
        self.step = step

    def after_step(self, run, report):
        if report.step == self.step:
            raise RuntimeError("broken")


@pytest.fixture
def slow(monkeypatch):
    """Makes each write last longer than several steps; returns when writes began and ended."""
    marks, write = [], background_save.stream_tensors

    def slowly(*arguments):
        marks.append(("begin", threading.current_thread().name))
        time.sleep(0.3)
        write(*arguments)
        marks.append(("end", threading.current_thread().name))

    monkeypatch.setattr(background_save, "stream_tensors", slowly)
    return marks


@pytest.fixture(scope="module")
def plain(values, tmp_path_factory):
    return run(values, tmp_path_factory.mktemp("plain") / "run")


def weights(output):
    return (output / "model" / "model.safetensors").read_bytes()


def test_checkpoints_hold_the_step_at_which_they_were_begun(values, plain, slow, tmp_path):
    output = run(values, tmp_path / "run", save_async=True)
    found = checkpoints(output)
    assert [folder.name for folder in found] == [folder.name for folder in checkpoints(plain)]
    for mine, theirs in zip(found, checkpoints(plain), strict=True):
        for file in ("state.safetensors", "state.json"):
            assert (mine / file).read_bytes() == (theirs / file).read_bytes()
    assert weights(output) == weights(plain)
    assert not list((output / "checkpoints").glob(".*"))


def test_a_save_waits_for_the_one_before_it(values, slow, tmp_path):
    run(values, tmp_path / "run", save_async=True, save_every=1)
    assert [mark for mark, _ in slow] == ["begin", "end"] * STEPS
    assert {thread for _, thread in slow} == {"checkpoint"}


def test_old_checkpoints_are_pruned_once_the_new_one_is_complete(values, tmp_path):
    output = run(values, tmp_path / "run", save_async=True, keep_last=2)
    assert [folder.name for folder in checkpoints(output)] == ["step-000006", "step-000008"]


def test_a_broken_run_completes_its_write_and_resumes_bit_for_bit(values, plain, slow, tmp_path):
    with pytest.raises(RuntimeError, match="broken"):
        run(values, tmp_path / "run", Break(5), save_async=True)
    assert checkpoints(tmp_path / "run")[-1].name == "step-000004"
    output = run(values, tmp_path / "run", save_async=True)
    assert weights(output) == weights(plain)


def test_an_error_of_the_writer_ends_the_run_with_a_sentence(values, monkeypatch, tmp_path):
    write, count = background_save.stream_tensors, iter(range(9))

    def fail(*arguments):
        if next(count) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(*arguments)

    monkeypatch.setattr(background_save, "stream_tensors", fail)
    with pytest.raises(EasyllmError) as error:
        run(values, tmp_path / "run", save_async=True)
    assert "\n" not in str(error.value)
    assert str(tmp_path / "run") in str(error.value)
    found = checkpoints(tmp_path / "run")
    assert [folder.name for folder in found] == ["step-000002"]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_two_ranks_write_in_the_background_and_resume(values, tmp_path):
    zero2, ways = {"layout": "zero2"}, {"save_async": True, "keep_last": 2}
    stages = {
        "sync": stage(values, tmp_path / "sync", 2, zero2, more={"keep_last": 2}),
        "killed": stage(values, tmp_path / "async", 2, zero2, more=ways, kill=5),
        "again": stage(values, tmp_path / "async", 2, zero2, more=ways),
    }
    ends, errors = run_stages(tmp_path, stages)
    assert ends["sync"]["codes"] == [0, 0], errors
    assert ends["again"]["codes"] == [0, 0], errors
    assert weights(tmp_path / "async") == weights(tmp_path / "sync")
    assert losses(tmp_path / "async")[-3:] == losses(tmp_path / "sync")[-3:]
    names = [folder.name for folder in checkpoints(tmp_path / "async")]
    assert names == ["step-000006", "step-000008"]
    for folder in checkpoints(tmp_path / "async"):
        other = tmp_path / "sync" / "checkpoints" / folder.name
        assert json.loads((folder / "state.json").read_text())["layout"] is not None
        for file in sorted(folder.glob("*.safetensors")):
            mine, theirs = load_file(file), load_file(other / file.name)
            assert mine.keys() == theirs.keys()
            assert all((mine[name] == theirs[name]).all() for name in mine)


def test_a_paged_optimizer_is_not_copied_to_memory(values):
    changes = {"save_async": True, "optimizer": {"kind": "adamw", "paged": True}}
    with pytest.raises(ValueError, match=r"optimizer\.paged=true"):
        TrainConfig.model_validate(values | changes)
