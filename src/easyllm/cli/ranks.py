"""Runs the command of this process in several ranks."""

import sys

import typer

from easyllm.parallel.launch import launch

FLAG = "--nproc"


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


__all__ = ["run_ranks", "without_flag"]
