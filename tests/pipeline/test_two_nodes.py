"""Runs on two hosts, started with torchrun: two network namespaces, or two loopback addresses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from easyllm.core.yaml_text import dump_yaml
from easyllm.train import TrainConfig

NAMES = ("easyllm-a", "easyllm-b")
TIMEOUT_S = 10


class Hosts:
    """Two hosts, and the link between them.

    Args:
        separate: whether they are network namespaces; otherwise both are this machine.
    """

    def __init__(self, separate):
        self.separate = separate
        self.addresses = ("10.77.0.1", "10.77.0.2") if separate else ("127.0.0.1", "127.0.0.2")

    def start(self, number, *words):
        """Starts a command of torchrun on a host."""
        prefix = ["ip", "netns", "exec", NAMES[number]] if self.separate else []
        link = "veth0" if self.separate else "lo"
        command = [
            *prefix,
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nproc-per-node", "1", "--nnodes", "2", "--node-rank", str(number)),
            *("--master-addr", self.addresses[0], "--master-port", "29577"),
            *("-m", "easyllm", *words),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": link}
        return subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def cut(self, process):
        """Makes the second host, which runs `process`, unreachable."""
        if self.separate:
            ip("-n", NAMES[1], "link", "set", "veth0", "down")
        else:
            os.killpg(process.pid, signal.SIGSTOP)


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts():
    try:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ends = ("type", "veth", "peer", "name", "veth0", "netns", NAMES[1])
        ip("link", "add", "veth0", "netns", NAMES[0], *ends)
        for number, name in enumerate(NAMES, start=1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "veth0")
            ip("-n", name, "link", "set", "veth0", "up")
        separate = True
    except (OSError, subprocess.CalledProcessError):  # no `ip`, or no right to make namespaces
        separate = False
    yield Hosts(separate)
    for name in NAMES if shutil.which("ip") else ():
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.fixture
def recipe(tmp_path, tiny_folder):
    texts = ["hello", "what is it", "0123456789 " * 3, "good morning " * 2, "dog", "fox " * 6]
    rows = [{"prompt": text[:3], "completion": text} for text in texts]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig.model_validate(
        {
            "model": str(tiny_folder),
            "data": {"train": [str(tmp_path / "rows.jsonl")], "max_seq_len": 64},
            "optimizer": {"kind": "adamw", "learning_rate": 1e-3},
            "batch_size": 3,
            "micro_batch_tokens": 64,
            "max_steps": 4,
            "epochs": 2000,
            "precision": "fp32",
            "save_every": 0,
            "parallel": {"layout": "zero2", "timeout_s": TIMEOUT_S},
        }
    )
    (tmp_path / "recipe.yaml").write_text(dump_yaml(config))
    return tmp_path / "recipe.yaml"


def test_two_hosts_learn_what_two_processes_do(hosts, recipe, tmp_path):
    words = ("train", str(recipe), f"output={tmp_path / 'hosts'}")
    started = [hosts.start(number, *words) for number in range(2)]
    for each in started:
        _, errors = each.communicate(timeout=240)
        assert each.returncode == 0, errors
    here = tmp_path / "here"
    command = ["train", str(recipe), f"output={here}", "--nproc", "2"]
    subprocess.run(
        [sys.executable, "-m", "easyllm", *command], check=True, capture_output=True, timeout=240
    )
    ours, theirs = (
        load_file(each / "model" / "model.safetensors") for each in (tmp_path / "hosts", here)
    )
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_a_host_that_is_cut_off_ends_the_run_on_both(hosts, recipe, tmp_path):
    output = tmp_path / "cut"
    words = ("train", str(recipe), f"output={output}", "max_steps=100000")
    first, second = (hosts.start(number, *words) for number in range(2))
    try:
        deadline = time.monotonic() + 240
        metrics = output / "metrics.jsonl"
        while not metrics.is_file() or metrics.read_text().count("\n") < 3:
            assert first.poll() is None, first.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        hosts.cut(second)
        _, errors = first.communicate(timeout=TIMEOUT_S + 60)
        assert first.returncode
        assert "CollectiveError" in errors
        assert f"within {TIMEOUT_S} s" in errors
        if hosts.separate:  # it does not wait for a store that it cannot reach
            _, errors = second.communicate(timeout=TIMEOUT_S + 60)
            assert second.returncode
            assert "CollectiveError" in errors
    finally:
        for each in (first, second):
            if each.poll() is None:
                os.killpg(each.pid, signal.SIGKILL)
                each.wait()
