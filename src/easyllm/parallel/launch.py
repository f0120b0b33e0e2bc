"""Starts the ranks of a run on this machine, and ends all of them when one fails.

    easyllm train RECIPE --nproc 2    one process for each rank, which run the same command

The launcher itself loads no torch. For several machines, start the same command with `torchrun`.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from easyllm.core.errors import ConfigError

GRACE_S = 1.0
"""Time in which other ranks may report why they failed, once one has."""
PATIENCE_S = 5.0
"""Time that ranks have to end after SIGTERM, before SIGKILL."""
INTERRUPT_S = 120.0
"""Time that ranks have to write a checkpoint after the launcher was interrupted."""
POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a rank failed.

    Attributes:
        rank: the rank.
        exit_code: its exit status; negative for a signal.
        time: when it failed, in seconds since 1970.
        is_secondary: whether it failed because another rank had ended.
        text: its sentence or its traceback; empty if it left none.
        reported_code: exit status for the launcher.
    """

    rank: int
    exit_code: int
    time: float
    is_secondary: bool
    text: str
    reported_code: int

    def message(self) -> str:
        """Returns what the user is told."""
        if self.text:
            return f"rank {self.rank}: {self.text.rstrip()}"
        if self.exit_code < 0:
            return f"rank {self.rank} was killed by {signal.Signals(-self.exit_code).name}"
        return f"rank {self.rank} ended with exit code {self.exit_code}"


def launch(
    command: Sequence[str], nproc: int, environment: Mapping[str, str] | None = None
) -> tuple[int, list[Failure]]:
    """Runs a command in `nproc` processes that find each other as the ranks of a run.

    Standard output and error are those of this process. SIGINT and SIGTERM are passed on, and the
    ranks are given time to write a checkpoint.

    Args:
        command: the command, such as `[sys.executable, "-m", "easyllm", "train", ...]`.
        nproc: number of processes.
        environment: variables to set in addition to the launcher's own.

    Returns:
        The exit status (0 if all ranks succeeded), and the failures, the root cause first.

    Raises:
        ConfigError: this process is itself a rank.
    """
    if "RANK" in os.environ:
        raise ConfigError(
            "--nproc starts processes, but this process was itself started as a rank (RANK is set)"
            "; give --nproc, or use torchrun, not both"
        )
    with tempfile.TemporaryDirectory(prefix="easyllm-") as folder:
        ranks = [
            subprocess.Popen(command, env=_environment(rank, nproc, Path(folder), environment))
            for rank in range(nproc)
        ]
        with _passing_on_signals(ranks) as interrupted:
            try:
                _wait(ranks, interrupted)
            finally:
                ended = _end(ranks)
        failures = _failures(ranks, Path(folder), ended)
    if not failures:
        return 0, []
    return failures[0].reported_code, failures


def _port(folder: str) -> int:
    """Returns a free port, the same for all ranks of a launch."""
    file = Path(folder) / "port"
    if not file.exists():
        file.write_text(str(free_port()), encoding="ascii")
    return int(file.read_text(encoding="ascii"))


def _environment(
    rank: int, nproc: int, folder: Path, more: Mapping[str, str] | None
) -> dict[str, str]:
    found = dict(os.environ) | dict(more or {})
    found |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_port(str(folder))),
        "TORCHELASTIC_ERROR_FILE": str(error_file(folder, rank)),
    }
    # a machine without a network resolves its own name to an address that nobody listens on
    found.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // nproc)))
    return found


def _wait(ranks: Sequence["subprocess.Popen[bytes]"], interrupted: Sequence[int]) -> None:
    """Waits until all ranks have ended, or a short time after the first has failed."""
    deadline = None
    while any(rank.poll() is None for rank in ranks):
        if deadline is None and interrupted:
            deadline = time.monotonic() + INTERRUPT_S
        if any(rank.poll() for rank in ranks):
            wait = INTERRUPT_S if interrupted else GRACE_S
            deadline = min(deadline or float("inf"), time.monotonic() + wait)
        if deadline is not None and time.monotonic() > deadline:
            return
        time.sleep(POLL_S)


def _end(ranks: Sequence["subprocess.Popen[bytes]"]) -> set[int]:
    """Ends the ranks that still run, and returns them."""
    running = {number for number, rank in enumerate(ranks) if rank.poll() is None}
    for number in running:
        ranks[number].terminate()
    deadline = time.monotonic() + PATIENCE_S
    for rank in ranks:
        with suppress(subprocess.TimeoutExpired):
            rank.wait(max(0.0, deadline - time.monotonic()))
        if rank.poll() is None:
            rank.kill()
            rank.wait()
    return running


@contextmanager
def _passing_on_signals(ranks: Sequence["subprocess.Popen[bytes]"]) -> Iterator[list[int]]:
    """Passes SIGINT and SIGTERM on to the ranks; yields the signals received so far."""
    received: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(signal.SIGTERM if len(received) == 1 else signal.SIGKILL)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _failures(
    ranks: Sequence["subprocess.Popen[bytes]"], folder: Path, ended: set[int]
) -> list[Failure]:
    """Returns the failures, those that are not the consequence of another first.

    Args:
        ranks: the processes, all of which have ended.
        folder: where they leave their errors.
        ended: the ranks that the launcher has ended.
    """
    found = [
        read_failure(number, rank.returncode, folder, was_ended=number in ended)
        for number, rank in enumerate(ranks)
        if rank.returncode
    ]
    return causes_first(found)


def read_failure(rank: int, code: int, folder: Path, *, was_ended: bool) -> Failure:
    """Returns why a rank failed, from its exit code and its error file."""
    note: dict[str, object] = {}
    with suppress(OSError, ValueError):
        text = error_file(folder, rank).read_text(encoding="utf-8")
        note = json.loads(text).get("easyllm", {})
    return Failure(
        rank=rank,
        exit_code=code,
        time=float(str(note.get("time", 0 if code < 0 else time.time()))),
        is_secondary=bool(note.get("lost", False)) or was_ended,
        text=str(note.get("traceback") or note.get("sentence") or ""),
        reported_code=int(str(note.get("exit_code", code if code > 0 else 128 - code))),
    )


def causes_first(failures: Iterable[Failure]) -> list[Failure]:
    """Returns failures, those that are the consequence of another one last."""
    # a rank killed by someone else left no note; it comes before those that only lost it
    return sorted(failures, key=lambda each: (each.is_secondary, each.time))


def error_file(folder: Path, rank: int) -> Path:
    """Returns the file in which a rank leaves its error."""
    return folder / f"error-{rank}.json"


def free_port(address: str = "127.0.0.1") -> int:
    """Returns a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port


__all__ = ["Failure", "causes_first", "error_file", "free_port", "launch", "read_failure"]
