"""Runs of `easyllm train --ray`: a lost worker, users' mistakes, and what workers report."""

import json
import os
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from easyllm.cli.main import app
from easyllm.core.errors import ConfigError, DataError
from easyllm.core.yaml_text import dump_yaml
from easyllm.parallel.failures import CollectiveError
from easyllm.parallel.ray_train import WorkersFailed, _failure, train_on_ray
from easyllm.train import Callback, TrainConfig, train


@pytest.fixture
def config(tmp_path, tiny_folder):
    texts = ["hello", "what is it", "0123456789 " * 3, "good morning " * 2, "dog", "fox " * 6]
    rows = [{"prompt": text[:3], "completion": text} for text in texts]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TrainConfig.model_validate(
        {
            "model": str(tiny_folder),
            "data": {"train": [str(file)], "max_seq_len": 64},
            "optimizer": {"kind": "adamw", "learning_rate": 1e-3},
            "batch_size": 3,
            "micro_batch_tokens": 64,
            "max_steps": 8,
            "epochs": 50,
            "precision": "fp32",
            "save_every": 2,
            "parallel": {"layout": "zero2"},
        }
    )


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_run_that_loses_a_worker_goes_on_from_its_last_checkpoint(tmp_path, config):
    """In the end it has the bits of a run in two processes that lost none."""
    pytest.importorskip("ray.train")
    (tmp_path / "recipe.yaml").write_text(dump_yaml(config))
    output, died, told = tmp_path / "ray", tmp_path / "died", []

    class DiesOnce(Callback):  # of rank 0, as all callbacks
        def after_step(self, run, report):
            if report.step == 5 and not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)

    train_on_ray(
        lambda: train(config, output, callbacks=[DiesOnce()]),
        2,
        output=output,
        restarts=1,
        restarted=told.append,
    )
    assert died.exists()
    assert [each.rank for each in told] == [0]
    assert not (tmp_path / ".ray.ray").exists()

    whole = tmp_path / "whole"
    words = ["train", str(tmp_path / "recipe.yaml"), f"output={whole}", "--nproc", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "easyllm", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(each / "model" / "model.safetensors") for each in (output, whole))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


class Failed(Exception):
    """An error of Ray Train, with those of its workers."""

    def __init__(self, worker_failures):
        super().__init__("training failed")
        self.worker_failures = worker_failures


class Wrapped(Exception):
    """How Ray Train returns an exception of a worker."""

    def __init__(self, error):
        super().__init__("Traceback ...\n" + repr(error))
        self._base_exc = error


def test_a_mistake_of_the_user_is_told_as_it_is():
    failures = {0: Wrapped(RuntimeError("gloo")), 1: Wrapped(DataError("rows.jsonl: no rows"))}
    with pytest.raises(DataError, match=r"rows\.jsonl: no rows"):
        _failure(Failed(failures))


def test_a_killed_rank_is_the_cause_of_what_others_say():
    failures = {0: Wrapped(RuntimeError("connection closed")), 1: RuntimeError("actor died")}
    found = _failure(Failed(failures))
    assert isinstance(found, WorkersFailed)
    assert (found.rank, str(found)) == (1, "rank 1: actor died")


def test_a_rank_that_failed_by_itself_is_told_before_those_that_waited_for_it():
    failures = {0: Wrapped(CollectiveError("rank 1 has ended")), 1: Wrapped(RuntimeError("bug"))}
    found = _failure(Failed(failures))
    assert found.rank == 1
    assert "bug" in str(found)


def test_an_error_without_workers_is_not_swallowed():
    with pytest.raises(ValueError, match="no disk"):
        _failure(ValueError("no disk"))


def test_ray_that_is_not_installed_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"--ray needs Ray Train .*\[ray\]"):
        train_on_ray(lambda: None, 2, output=tmp_path / "run", restarts=0)


def test_a_run_is_started_here_or_on_a_cluster(tmp_path, config):
    (tmp_path / "recipe.yaml").write_text(dump_yaml(config))
    words = ["train", str(tmp_path / "recipe.yaml"), f"output={tmp_path / 'run'}"]
    words += ["--ray", "2", "--nproc", "2"]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, ConfigError)
    assert "give one of them" in str(result.exception)
    assert not (tmp_path / "run").exists()
