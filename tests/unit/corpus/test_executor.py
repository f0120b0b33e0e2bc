"""Local workers persist between maps and exit with the process that started them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from easyllm.core.errors import DataError
from easyllm.corpus.executor import LocalExecutor, build_executor

SCRIPT = """
import os, sys, time
from pathlib import Path
from easyllm.corpus.executor import LocalExecutor

def work(folder):
    Path(folder, str(os.getpid())).touch()
    time.sleep(60)

if __name__ == "__main__":
    with LocalExecutor(2) as executor:
        list(executor.map(work, [sys.argv[1]] * 2))
"""


@dataclass(frozen=True, slots=True)
class Numbered:
    """An item."""

    number: int


@dataclass(frozen=True, slots=True)
class Done:
    """A result: the number of the item, and the process that did the work."""

    number: int
    pid: int


@dataclass(frozen=True, slots=True)
class Task:
    """Work on numbered items."""

    function: Callable[[Numbered], Done]
    item_type: type[Numbered] = Numbered
    result_type: type[Done] = Done

    def __call__(self, item):
        return self.function(item)


def done_here(item):
    return Done(item.number, os.getpid())


def refuse_two(item):
    if item.number == 2:
        raise DataError("number 2 is bad")
    return Done(item.number, 0)


def is_running(pid):
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def numbered(count):
    return [Numbered(number) for number in range(count)]


def test_results_are_ordered_and_processes_outlive_a_map():
    with LocalExecutor(2) as executor:
        first, second = (list(executor.map(Task(done_here), numbered(9))) for _ in range(2))
    assert [done.number for done in first] == list(range(9))
    pids = {done.pid for done in [*first, *second]}
    assert os.getpid() not in pids
    assert len(pids) <= 2


def test_an_error_ends_the_map_but_not_the_processes():
    with LocalExecutor(2) as executor:
        with pytest.raises(DataError, match="number 2 is bad"):
            list(executor.map(Task(refuse_two), numbered(9)))
        assert list(executor.map(Task(refuse_two), numbered(2))) == [Done(0, 0), Done(1, 0)]


def test_one_worker_runs_in_the_process_itself():
    with build_executor("local", 1) as executor:
        assert next(executor.map(Task(done_here), numbered(3))).pid == os.getpid()


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_ray_returns_typed_results_in_order_and_the_type_of_an_error():
    pytest.importorskip("ray")
    with build_executor("ray", 2) as executor:
        done = list(executor.map(Task(done_here), numbered(5)))
        assert [one.number for one in done] == list(range(5))
        assert os.getpid() not in {one.pid for one in done}
        with pytest.raises(DataError, match="number 2 is bad"):
            list(executor.map(Task(refuse_two), numbered(5)))
        assert list(executor.map(Task(done_here), [])) == []


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_workers_of_a_killed_process_exit(tmp_path):
    script, folder = tmp_path / "slow.py", tmp_path / "pids"
    script.write_text(SCRIPT)
    folder.mkdir()
    process = subprocess.Popen([sys.executable, str(script), str(folder)])
    while len(list(folder.iterdir())) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 20
    while left := [file.name for file in folder.iterdir() if is_running(file.name)]:
        assert time.monotonic() < end, f"workers {left} outlived their parent"
        time.sleep(0.05)
