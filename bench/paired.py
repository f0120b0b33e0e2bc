"""Alternating measurements of two checkouts: persistent workers and the median of the ratios."""

import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any


def median_ratio(ratios: list[float]) -> list[float]:
    """Returns the median and its 95% confidence interval, from order statistics."""
    ordered, count = sorted(ratios), len(ratios)
    outside, low = 0.5**count, 0  # probability that the median is below ordered[low]
    while low + 1 < count // 2 and outside + math.comb(count, low + 1) * 0.5**count <= 0.025:
        low += 1
        outside += math.comb(count, low) * 0.5**count
    return [round(x, 3) for x in (statistics.median(ordered), ordered[low], ordered[-1 - low])]


class Worker:
    """A process that answers each JSON line with another.

    Args:
        command: command line of the process.
        checkout: checkout whose `src` it imports `easyllm` from.
        environment: additional environment variables.
    """

    def __init__(
        self, command: list[str], checkout: Path, environment: dict[str, str] | None = None
    ) -> None:
        env = {**os.environ, "PYTHONPATH": str(Path(checkout).resolve() / "src")}
        env |= {"HF_HUB_OFFLINE": "1"} | (environment or {})
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True
        )

    def ask(self, question: Any) -> Any:
        """Returns the answer to a question; lines that are not JSON objects are skipped."""
        assert self.process.stdin is not None, "opened as a pipe"
        assert self.process.stdout is not None, "opened as a pipe"
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"a worker exited with {self.process.wait()} before it answered")

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()


def answer_questions(answer: Any) -> None:
    """Runs the worker's side: prints `answer(question)` as JSON for each line of standard input."""
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


def peak_rss_mb() -> int:
    """Returns the peak memory of this process in megabytes."""
    with open("/proc/self/status") as status:
        line = next(x for x in status if x.startswith("VmHWM"))
    return round(int(line.split()[1]) / 1024)


__all__ = ["Worker", "answer_questions", "median_ratio", "peak_rss_mb"]
