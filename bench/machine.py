"""Fields common to all rows that describe the machine and the code, and where rows are stored."""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SHARED = HERE.parents[1] / "shared"


def row(bench: str, **figures: Any) -> dict[str, Any]:
    """Returns a row: what was measured, when, on which commit and machine."""
    return {
        "bench": bench,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        **figures,
    }


def finish(row: dict[str, Any], topic: str, *, record: bool) -> None:
    """Prints the row; `record` appends it to `bench/results/TOPIC.jsonl`."""
    print(json.dumps(row))
    if record:
        with (HERE / "results" / f"{topic}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


def machine() -> dict[str, object]:
    import torch

    from easyllm.core.device import cpu_features

    threads, rates = torch.get_num_threads(), {}
    torch.set_num_threads(2)
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2048, 1536, dtype=dtype), torch.randn(1536, 1536, dtype=dtype)
        times = []
        for _ in range(8):
            start = time.perf_counter()
            a @ b.T
            times.append(time.perf_counter() - start)
        name = str(dtype).removeprefix("torch.")
        rates[f"{name}_matmul_gflops"] = round(2 * 2048 * 1536 * 1536 / min(times) / 1e9)
    torch.set_num_threads(threads)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": threads,
        "cpu_features": sorted(cpu_features()),
        **rates,
    }


def easyllm(*words: str) -> str:
    """Returns the standard output of an `easyllm` command; its standard error is passed through."""
    command = [sys.executable, "-m", "easyllm", *words]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def figures_of(command: Sequence[object]) -> dict[str, Any]:
    """Returns the last line of a command's output, a JSON object."""
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE
    )
    return done.stdout.strip()
