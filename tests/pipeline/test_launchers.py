"""Launchers of several processes: restarts, and torchrun on two nodes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from easyllm.core.yaml_text import dump_yaml
from easyllm.parallel.launch import free_port
from easyllm.train import TrainConfig, train
from stage_runs import losses

DIE = """
import os, signal, sys
from easyllm.train import loop
plain = loop.take_step
def take_step(run):
    report = plain(run)
    if report.step == 5 and run.parallel.mesh.world.rank == 1 and not os.path.exists({flag!r}):
        open({flag!r}, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return report
loop.take_step = take_step
"""
"""What makes rank 1 die after step 5, once."""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("launchers")
    texts = ["hello", "what is it", "0123456789 " * 3, "good morning " * 2, "dog", "fox " * 6]
    rows = [{"prompt": text[:3], "completion": text} for text in texts]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig.model_validate(
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
        }
    )
    (folder / "recipe.yaml").write_text(dump_yaml(config))
    train(config, folder / "one")
    return folder


def dying(folder, flag):
    """The environment in which rank 1 dies once."""
    site = folder / f"site-{flag}"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import sys\nif any('easyllm' in a for a in sys.orig_argv) and 'RANK' in "
        "__import__('os').environ:\n"
        + "".join(f"    {line}\n" for line in DIE.format(flag=str(folder / flag)).splitlines())
    )
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    return ENVIRONMENT | {"PYTHONPATH": path}


def command(folder, output, *words):
    recipe = str(folder / "recipe.yaml")
    return [sys.executable, "-m", "easyllm", "train", recipe, f"output={output}", *words]


def test_a_run_restarts_from_its_newest_checkpoint(recipe):
    words = ("parallel.layout=zero2", "--nproc", "2", "--restarts", "2")
    done = subprocess.run(
        command(recipe, recipe / "restarted", *words),
        env=dying(recipe, "died"), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "error: rank 1 was killed by SIGKILL" in done.stderr
    assert "starting again from the newest checkpoint; restarts left: 1" in done.stderr
    assert "resumed at step 4 of 8" in done.stderr
    assert losses(recipe / "restarted") == pytest.approx(losses(recipe / "one"), abs=1e-5)


def test_a_users_mistake_is_not_tried_again(recipe):
    words = ("parallel.tensor=3", "--nproc", "2", "--restarts", "2")
    done = subprocess.run(
        command(recipe, recipe / "never", *words), env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.count("parallel.tensor=3 does not divide the 2 processes") == 1
    assert "starting again" not in done.stderr
    assert not (recipe / "never").exists()


def nodes(folder, output, port, *words):
    """The processes of two nodes, each with an agent of torchrun."""
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"),
                *("--nnodes", "2", "--node-rank", str(node), "--master-addr", "127.0.0.1"),
                *("--master-port", str(port), "--local-addr", f"127.0.0.{node + 1}"),
                *("-m", *command(folder, output, *words)[2:]),
            ],
            env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
        )
        for node in range(2)
    ]  # fmt: skip


def test_a_node_that_is_killed_ends_the_other(recipe):
    output = recipe / "cut"
    first, second = nodes(recipe, output, free_port(), "max_steps=100000")
    deadline = time.monotonic() + 600
    while not (output / "checkpoints" / "step-000004").is_dir():
        assert first.poll() is None
        assert second.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    worker = Path(f"/proc/{second.pid}/task/{second.pid}/children").read_text().split()
    for pid in (second.pid, *map(int, worker)):
        os.kill(pid, signal.SIGKILL)
    cut = time.monotonic()
    try:
        _, errors = first.communicate(timeout=120)  # seconds on an idle machine
    finally:
        first.terminate()  # the agent ends its rank
    second.communicate()
    assert first.returncode != 0
    assert time.monotonic() - cut < 120
    assert "another rank has ended" in errors
