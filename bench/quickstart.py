"""The quickstart over several seeds: recall and cost, as one JSON row.

python bench/quickstart.py [--seeds 0 1 2] [--record]
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import machine

FIGURES = {
    "recall_before": ("recall", "before"),
    "recall_after": ("recall", "after"),
    "heldout_loss_before": ("heldout_loss_nats", "before"),
    "heldout_loss_after": ("heldout_loss_nats", "after"),
    "unrelated_loss_before": ("unrelated_loss_nats", "before"),
    "unrelated_loss_after": ("unrelated_loss_nats", "after"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    runs = [one(seed) for seed in options.seeds]
    median = {k: statistics.median(run[k] for run in runs) for k in runs[0] if k != "seed"}
    row = machine.row("quickstart", median=median, runs=runs)
    machine.finish(row, "quickstart", record=options.record)


def one(seed: int) -> dict[str, float]:
    """The figures of one run."""
    with tempfile.TemporaryDirectory() as work:
        words = [
            "quickstart",
            "--no-serve",
            "--json",
            f"seed={seed}",
            f"output={Path(work) / 'run'}",
        ]
        summary = json.loads(machine.easyllm(*words))
    figures = {name: round(summary[a][b], 4) for name, (a, b) in FIGURES.items()}
    figures["seed"] = seed
    figures |= {k: summary[k] for k in ("train_tokens_per_s", "total_seconds", "peak_rss_gb")}
    return figures


if __name__ == "__main__":
    main()
