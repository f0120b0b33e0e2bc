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
from easyllm.parallel.launch import launch
from easyllm.parallel.ray_train import WorkersFailed, train_on_ray

if TYPE_CHECKING:
    from easyllm.train import TrainConfig

FLAG = "--nproc"
FOLLOW_S = 2.0
"""Time between two looks at the metrics of a run on a cluster."""


def run_ranks(nproc: int) -> None:
    """Runs this process's own command line, without `--nproc`, as the ranks of one run.

    Raises:
        typer.Exit: a rank failed; the root cause has been printed first.
    """
    command = [sys.executable, "-m", "easyllm", *without_flag(sys.argv[1:])]
    code, failures = launch(command, nproc)
    for number, failure in enumerate(failures):
        prefix = "error: " if number == 0 else "then "
        text = failure.message() if number == 0 else failure.message().splitlines()[-1]
        sys.stderr.write(f"{prefix}{text}\n")
    if code:
        raise typer.Exit(code)


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


def without_flag(words: list[str]) -> list[str]:
    """Returns a command line without `--nproc N` and `--nproc=N`."""
    found: list[str] = []
    skip = False
    for word in words:
        if skip or word.startswith(f"{FLAG}="):
            skip = False
            continue
        if word == FLAG:
            skip = True
            continue
        found.append(word)
    return found


__all__ = ["run_ranks", "run_workers", "without_flag"]
