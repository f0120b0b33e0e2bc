"""Fine-tuning of SmolLM2 on 128 Alpaca rows, LoRA or every weight: tokens a second and peak memory, as one JSON row.

    python bench/train.py [--mode lora|full] [--data FILE] [--rows 128] [--peer PYTHON] [--record]

The work is that of TRL's usual script: rank 8 on all linears (or every weight), loss on every token, cut at 512, batch 4, one
epoch. `full` also times steps of 2,048 packed tokens, as a share of the machine's matmul rate in the same process.
With `--peer`, the same is run by TRL (an interpreter that has `trl`, `peft` and `datasets`) in the same sitting, once
for each of its settings, and the ratio to the best of them is printed. `--record` appends the row to `bench/results/`.
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

import machine
import torch
from machine import SHARED

from easyllm.core.device import bf16_is_fast

SETTINGS = (("bf16", "1"), ("bf16", "0"), ("f32", "1"), ("f32", "0"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", choices=["lora", "full"], default="lora")
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "alpaca_en_demo.json")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--peer", help="Python interpreter with trl, peft and datasets")
    parser.add_argument("--peer-settings", type=int, default=2, help="how many of TRL's settings")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    row = machine.row(f"train-{options.mode}", ours=ours(options))
    if options.mode == "full":
        row["packed_2048"] = packed_steps(options)
    if options.peer:
        with tempfile.TemporaryDirectory() as work:
            row["trl"] = peer(options, Path(work))
        # once more, so that a machine that changed its speed meanwhile shows
        row["ours_again"] = ours(options)
        best = max(r["tok_s"] for r in row["trl"])
        slower = min(row["ours"]["tokens_per_s"], row["ours_again"]["tokens_per_s"])
        row["ratio_to_best_trl"] = round(slower / best, 2)
    machine.finish(row, "train", record=options.record)


def ours(options: argparse.Namespace) -> dict[str, float]:
    """One epoch in a process of its own; wall time from the first step to the last, as TRL's `train()`."""
    words = ["batch_size=4", "epochs=1", "optimizer.learning_rate=2e-4"]
    start = time.perf_counter()
    figures, lines = run(options, words)
    wall = time.perf_counter() - start
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


def packed_steps(options: argparse.Namespace) -> dict[str, float]:
    """Steps of 2,048 packed tokens: the median rate, and the model's FLOPs as a share of the matmul rate."""
    words = ["batch_size=null", "batch_tokens=2048", "max_steps=8"]
    _, lines = run(options, words)
    steps = sorted((x for x in lines if "speed/mfu" in x), key=lambda x: x["speed/mfu"])
    middle = steps[len(steps) // 2]
    return {
        "tokens_per_s": round(middle["speed/tokens_per_s"], 1),
        "mfu": round(middle["speed/mfu"], 3),
    }


def run(options: argparse.Namespace, words: list[str]) -> tuple[dict, list[dict]]:
    """A training run's figures, and the lines of its `metrics.jsonl`."""
    adapter = ["adapter.rank=8", "adapter.alpha=16"] if options.mode == "lora" else ["adapter=null"]
    with tempfile.TemporaryDirectory() as work:
        file, out = Path(work) / "rows.json", Path(work) / "run"
        file.write_text(json.dumps(json.loads(options.data.read_text())[: options.rows]))
        said = machine.easyllm(
            *("train", "sft-lora", f"data.train=[{file}]", f"output={out}"),
            *("data.max_seq_len=512", "data.train_on=all", "save_every=0"),
            *(*adapter, *words, "--json"),
        )
        lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    return json.loads(said), lines


def peer(options: argparse.Namespace, work: Path) -> list[dict[str, float]]:
    """TRL on the same rows, a process a setting."""
    model = work / "smollm2"
    machine.easyllm("convert", "smollm2", str(model))
    found = []
    settings = sorted(SETTINGS, key=lambda s: (s[0] == "bf16") != bf16_is_fast(torch.device("cpu")))
    for dtype, packing in settings[: options.peer_settings]:
        script = SHARED / "peers" / "trl_sft.py"
        command = [options.peer, str(script), str(model), str(options.data), dtype, packing]
        command.append(options.mode)
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.strip().splitlines()[-1]))
    return found


if __name__ == "__main__":
    main()
