"""Runs the command of this process in several ranks, or its training in workers of Ray."""

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from easyllm.core.errors import EasyllmError
from easyllm.core.json_types import JsonObject
from easyllm.core.manifest import MANIFEST_FILE
from easyllm.core.progress import Progress
from easyllm.parallel.launch import Failure, launch
from easyllm.parallel.ray_train import WorkersFailed, train_on_ray

if TYPE_CHECKING:
    from easyllm.train import TrainConfig

FLAGS = ("--nproc", "--restarts")
"""Flags of the launcher."""
FINAL = (2, 130, 143)
"""Exit codes after which nothing is started again: a user's mistake, Ctrl-C, SIGTERM."""
FOLLOW_S = 2.0
"""Time between two looks at the metrics of a run on a cluster."""


def run_ranks(nproc: int, *, restarts: int = 0) -> None:
    """Runs this process's own command line, without the launcher's flags, as the ranks of a run.

    Args:
        nproc: number of processes.
        restarts: how often all are started again after one has failed; a run then resumes from its
            newest checkpoint.

    Raises:
        ConfigError: this process is itself a rank.
        typer.Exit: a rank failed; the root cause has been printed first.
    """
    command = [sys.executable, "-m", "easyllm", *without_flags(sys.argv[1:])]
    for left in range(restarts, -1, -1):
        code, failures = launch(command, nproc)
        _print(failures)
        if not code:
            return
        if code in FINAL or not left:
            raise typer.Exit(code)
        sys.stderr.write(f"starting again from the newest checkpoint; restarts left: {left - 1}\n")


def _print(failures: list[Failure]) -> None:
    """Prints the root cause, then the last line of each failure that says something else."""
    for number, failure in enumerate(failures):
        if number == 0:
            sys.stderr.write(f"error: {failure.message()}\n")
        elif not failure.text or failure.text != failures[0].text:
            sys.stderr.write(f"then {failure.message().splitlines()[-1]}\n")


def run_workers(
    run: Callable[[], object], workers: int, config: "TrainConfig", restarts: int
) -> JsonObject:
    """Calls `run` in Ray workers, and returns the figures in the run's manifest.

    Raises:
        typer.Exit: a worker failed once more than `restarts`; the reason has been printed.
    """

    def restarted(failure: WorkersFailed) -> None:
        last = failure.reason.rstrip().splitlines()[-1:] or ["it ended"]
        reason = f"rank {failure.rank} failed ({last[0]})"
        sys.stderr.write(f"{reason}; continuing from {config.output}\n")

    assert config.output is not None, "checked before"
    output = Path(config.output).absolute()
    try:
        with _following(output):
            train_on_ray(run, workers, output=output, restarts=restarts, restarted=restarted)
    except WorkersFailed as failure:
        sys.stderr.write(f"error: {failure}\n")
        raise typer.Exit(1) from None
    found: JsonObject = json.loads((output / MANIFEST_FILE).read_text("utf-8"))["results"]
    return found


@contextmanager
def _following(output: Path) -> Iterator[None]:
    """Shows the steps that a run on other machines logs in its folder, as they appear."""
    ended = threading.Event()

    def follow() -> None:
        from easyllm.train.metrics import read_metrics

        with Progress("training on Ray", unit="step") as progress:
            while not ended.wait(FOLLOW_S):
                with suppress(EasyllmError):  # the file does not exist yet
                    rows = [row for row in read_metrics(output) if "train/loss_nats" in row]
                    for row in rows[-1:]:
                        loss = float(row["train/loss_nats"])
                        progress.advance(float(row["step"]) - progress.done, loss=loss)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def without_flags(words: list[str]) -> list[str]:
    """Returns a command line without the flags of the launcher."""
    found: list[str] = []
    skip = False
    for word in words:
        if skip or word.partition("=")[0] in FLAGS:
            skip = not skip and word in FLAGS  # the value is the next word
            continue
        found.append(word)
    return found


__all__ = ["run_ranks", "run_workers", "without_flags"]
