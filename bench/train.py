"""LoRA fine-tuning of SmolLM2 on 128 Alpaca rows: tokens a second and peak memory, as one JSON row.

    python bench/train.py [--data FILE] [--rows 128] [--peer PYTHON] [--record]

The work is that of TRL's usual script: rank 8 on all linears, loss on every token, cut at 512, batch 4, one epoch.
With `--peer`, the same is run by TRL (an interpreter that has `trl`, `peft` and `datasets`) in the same sitting, once
for each of its settings, and the ratio to the best of them is printed. `--record` appends the row to `bench/results/`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine
from machine import SHARED

SETTINGS = (("bf16", "1"), ("bf16", "0"), ("f32", "1"), ("f32", "0"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "alpaca_en_demo.json")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--peer", help="Python interpreter with trl, peft and datasets")
    parser.add_argument("--peer-settings", type=int, default=2, help="how many of TRL's settings")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    row = machine.row("train-lora", ours=ours(options.data, options.rows))
    if options.peer:
        with tempfile.TemporaryDirectory() as work:
            row["trl"] = peer(options, Path(work))
        # once more, so that a machine that changed its speed meanwhile shows
        row["ours_again"] = ours(options.data, options.rows)
        best = max(r["tok_s"] for r in row["trl"])
        slower = min(row["ours"]["tokens_per_s"], row["ours_again"]["tokens_per_s"])
        row["ratio_to_best_trl"] = round(slower / best, 2)
    machine.finish(row, "train", record=options.record)


def ours(data: Path, rows: int) -> dict[str, float]:
    """One epoch in a process of its own; wall time from the first step to the last, as TRL's `train()`."""
    with tempfile.TemporaryDirectory() as work:
        file, out = Path(work) / "rows.json", Path(work) / "run"
        file.write_text(json.dumps(json.loads(data.read_text())[:rows]))
        words = [
            *("train", "sft-lora", f"data.train=[{file}]", f"output={out}", "data.max_seq_len=512"),
            *("data.train_on=all", "adapter.rank=8", "adapter.alpha=16", "batch_size=4"),
            *("optimizer.learning_rate=2e-4", "epochs=1", "save_every=0", "--json"),
        ]
        start = time.perf_counter()
        command = [sys.executable, "-m", "easyllm", *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        wall = time.perf_counter() - start
        figures = json.loads(done.stdout)
        lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [x for x in lines if "speed/tokens_per_s" in x]
    seconds = sum(x["train/tokens"] / x["speed/tokens_per_s"] for x in steps)
    tokens = figures["tokens"] + figures["data"]["samples"]  # TRL counts each row's last token too
    return {
        "tokens": tokens,
        "tokens_per_s": round(tokens / seconds, 1),
        "train_s": round(seconds, 1),
        "whole_command_s": round(wall, 1),
        "peak_rss_gb": round(figures["peak_rss_bytes"] / 1e9, 2),
        "last_loss_nats": round(steps[-1]["train/loss_nats"], 4),
    }


def peer(options: argparse.Namespace, work: Path) -> list[dict[str, float]]:
    """TRL on the same rows, a process a setting."""
    model = work / "smollm2"
    subprocess.run(
        [sys.executable, "-m", "easyllm", "convert", "smollm2", str(model)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    found = []
    for dtype, packing in SETTINGS[: options.peer_settings]:
        script = SHARED / "peers" / "trl_sft.py"
        command = [options.peer, str(script), str(model), str(options.data), dtype, packing, "lora"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.strip().splitlines()[-1]))
    return found


if __name__ == "__main__":
    main()
