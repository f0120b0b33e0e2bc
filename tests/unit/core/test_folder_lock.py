"""A folder is locked by one process at a time, and a killed process leaves no lock."""

import errno
import os
import subprocess
import sys

import pytest

from easyllm.core.config import Config
from easyllm.core.errors import OutputError
from easyllm.core.folder_lock import LOCK_FILE, check_unlocked, locked_folder
from easyllm.core.run_folder import RECIPE_FILE, check_run_folder, claim_run_folder

HOLDER = """
import sys, time
from pathlib import Path
from easyllm.core.folder_lock import locked_folder
with locked_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


class Setting(Config):
    """A configuration of one key."""

    value: int = 1


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of a folder, and the folder."""
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process, folder
        process.kill()


def test_a_folder_in_use_is_refused_with_the_process(holder):
    process, folder = holder
    for use in (check_run_folder, lambda *given: claim_run_folder(*given).__enter__()):
        with pytest.raises(OutputError, match=rf"another process is using .*\(pid {process.pid}\)"):
            use(folder, Setting())
    assert not (folder / RECIPE_FILE).exists()


def test_the_folder_of_a_killed_process_can_be_claimed_at_once(holder):
    process, folder = holder
    process.kill()
    process.wait()
    assert (folder / LOCK_FILE).exists()
    with claim_run_folder(folder, Setting()):
        assert (folder / LOCK_FILE).read_text().split()[0] == str(os.getpid())
    assert [file.name for file in folder.iterdir()] == [RECIPE_FILE]


def test_a_lock_is_not_shared_within_a_process(tmp_path):
    with locked_folder(tmp_path), pytest.raises(OutputError, match="another process is using"):
        check_unlocked(tmp_path)
    check_unlocked(tmp_path)


def test_a_folder_that_stays_empty_is_removed(tmp_path):
    with locked_folder(tmp_path / "new"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_warned_about(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    with claim_run_folder(tmp_path / "run", Setting()):
        assert (tmp_path / "run" / RECIPE_FILE).is_file()
    assert "without locks" in caplog.text
