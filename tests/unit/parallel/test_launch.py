"""The launcher: all ranks end when one fails, and its own error comes first."""

import sys
import time

import pytest

from easyllm.core.errors import ConfigError
from easyllm.parallel.launch import launch

FAIL = """
import os, sys, time
from easyllm.core.errors import ConfigError
from easyllm.parallel.failures import record_error
rank = int(os.environ["RANK"])
if rank == 1:
    try:
        {cause}
    except BaseException as error:
        record_error(error)
        sys.exit(getattr(error, "exit_code", 1))
try:
    if {lost}:
        time.sleep(0.3)
        raise RuntimeError("[gloo] Connection closed by peer [127.0.0.1]")
    time.sleep(60)
except RuntimeError as error:
    record_error(error)
    sys.exit(1)
"""


def run(cause, *, lost=False, ranks=2):
    code = FAIL.format(cause=cause, lost=lost)
    return launch([sys.executable, "-c", code], ranks)


def test_one_rank_s_failure_ends_all_with_its_traceback_first():
    start = time.monotonic()
    code, failures = run("raise ValueError('the cause')", lost=True)
    assert time.monotonic() - start < 30
    assert code == 1
    assert failures[0].rank == 1
    assert "the cause" in failures[0].message()
    assert "Traceback" in failures[0].message()
    assert [each.is_secondary for each in failures] == [False, True]


def test_a_user_s_mistake_is_a_sentence_with_exit_code_2():
    code, failures = run("raise ConfigError('lower x')")
    assert code == 2
    assert failures[0].message() == "rank 1: lower x"


def test_a_killed_rank_is_named():
    code, failures = run("os.kill(os.getpid(), 9)", lost=True)
    assert code == 137
    assert failures[0].message() == "rank 1 was killed by SIGKILL"


def test_ranks_find_each_other_in_the_environment():
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    code = f"import os, sys; sys.exit(not all(os.environ.get(n) for n in {names}))"
    assert launch([sys.executable, "-c", code], 2) == (0, [])


def test_a_rank_launches_no_ranks(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="not both"):
        launch(["true"], 2)
