"""Fine-tuning of SmolLM2 on 128 Alpaca rows, LoRA or full: tokens/s and peak memory; one JSON row.

    python bench/train.py [--mode lora|full|packed] [--data FILE] [--rows 128] [--peer PYTHON]
                          [--record]

The configuration is that of TRL's usual script: rank 8 on all linears (or full fine-tuning), loss
on all tokens, truncation at 512, batch size 4, one epoch. `full` also trains with int8 optimizer
moments, and times steps of 2,048 packed tokens, relative to the machine's matmul rate in the same
process; `packed` does only that. ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 disables AMX on a CPU that has
it, both for the GEMMs and for the reference matmul rate. With `--peer` (an interpreter that has
`trl`, `peft` and `datasets`), TRL runs the same in the same session, once per setting, and the
ratio to its best setting is printed. `--record` appends the row to `bench/results/`.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import torch
from machine import SHARED

from easyllm.core.device import bf16_is_fast
from easyllm.plan.machine import matmul_rate
from easyllm.train import TrainConfig
from easyllm.train.factories import build_model, find_base_model
from easyllm.train.loop import accumulate, apply_gradients
from easyllm.train.objectives import LanguageModel
from easyllm.train.precision import build_precision_policy, compute_dtype
from easyllm.train.training_data import load_training_data
from easyllm.train.training_run import step_flops

SETTINGS = (("bf16", "1"), ("bf16", "0"), ("f32", "1"), ("f32", "0"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", choices=["lora", "full", "packed"], default="lora")
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "alpaca_en_demo.json")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--peer", help="Python interpreter with trl, peft and datasets")
    parser.add_argument("--peer-settings", type=int, default=2, help="how many of TRL's settings")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    row = machine.row(f"train-{options.mode}", onednn_most=os.environ.get("ONEDNN_MAX_CPU_ISA"))
    if options.mode != "packed":
        row["ours"] = ours(options)
    if options.mode == "full":
        row["ours_int8_moments"] = ours(options, "optimizer.state=int8")
    if options.mode != "lora":
        row["packed_2048"] = packed_steps(options)
    if options.peer and options.mode != "packed":
        with tempfile.TemporaryDirectory() as work:
            row["trl"] = peer(options, Path(work))
        # repeated, to reveal a change of the machine's speed in the meantime
        row["ours_again"] = ours(options)
        best = max(r["tok_s"] for r in row["trl"])
        slower = min(row["ours"]["tokens_per_s"], row["ours_again"]["tokens_per_s"])
        row["ratio_to_best_trl"] = round(slower / best, 2)
    machine.finish(row, "train", record=options.record)


def ours(options: argparse.Namespace, *more: str) -> dict[str, float]:
    """Runs one epoch in a separate process; timed from first to last step, as TRL's `train()`."""
    words = ["batch_size=4", "epochs=1", "optimizer.learning_rate=2e-4", *more]
    start = time.perf_counter()
    figures, lines = run(options, words)
    wall = time.perf_counter() - start
    steps = [x for x in lines if "speed/tokens_per_s" in x]
    seconds = sum(x["train/tokens"] / x["speed/tokens_per_s"] for x in steps)
    tokens = figures["tokens"] + figures["data"]["samples"]  # TRL also counts each row's last token
    return {
        "tokens": tokens,
        "tokens_per_s": round(tokens / seconds, 1),
        "train_s": round(seconds, 1),
        "whole_command_s": round(wall, 1),
        "peak_rss_gb": round(figures["peak_rss_bytes"] / 1e9, 2),
        "last_loss_nats": round(steps[-1]["train/loss_nats"], 4),
    }


def packed_steps(options: argparse.Namespace, *, steps: int = 12) -> dict[str, Any]:
    """Times steps of 2,048 packed tokens relative to the matmul rate measured around each step.

    Returns medians of the rates and of the MFU (the model's FLOPs as a share of the matmul rate),
    the figures of each step, because shared machines change their speed, and the overall MFU.
    """
    with tempfile.TemporaryDirectory() as work:
        config = TrainConfig.model_validate(
            {
                "data": {
                    "train": [str(rows(options, Path(work)))],
                    "max_seq_len": 512,
                    "train_on": "all",
                },
                "batch_size": None,
                "batch_tokens": 2048,
                "micro_batch_tokens": 2560,  # one forward pass per step
            }
        )
        origin, objective = find_base_model(config), LanguageModel()
        context = origin.config.max_seq_len
        data = load_training_data(config, origin.tokenizer, objective, context=context)
    cpu = torch.device("cpu")
    trained = build_model(config, origin, objective, cpu)
    model, dtype = trained.model, compute_dtype(config, cpu)
    precision = build_precision_policy(config, model.config, cpu)
    flops = step_flops(model.config, config)
    model.train()
    measured = []  # tokens, FLOPs, seconds and matmul rate of each step
    for number in range(steps + 2):  # the first two are warm-up
        batches = data.loader.next_step()
        before = matmul_rate(dtype, repeats=40)  # half a second, because its speed fluctuates
        start = time.perf_counter()
        loss, _ = accumulate(model, objective, batches, precision)
        apply_gradients(trained.optimizer, precision, 1.0, 1.0, loss)
        seconds = time.perf_counter() - start
        rate = (before + matmul_rate(dtype, repeats=40)) / 2
        lengths = tuple(n for batch in batches for n in batch.lengths)
        if number > 1:
            measured.append((sum(lengths), flops(lengths), seconds, rate))
    shares = [done / seconds / rate for _, done, seconds, rate in measured]
    rates = [rate for *_, rate in measured]
    possible = sum(seconds * rate for *_, seconds, rate in measured)
    return {
        "tokens_per_s": round(statistics.median(n / seconds for n, _, seconds, _ in measured), 1),
        "matmul_gflops": round(statistics.median(rates) / 1e9),
        "mfu": round(statistics.median(shares), 3),
        "steps": [[round(r / 1e9), round(s, 2)] for r, s in zip(rates, shares, strict=True)],
        "mfu_overall": round(sum(done for _, done, *_ in measured) / possible, 3),
    }


def rows(options: argparse.Namespace, work: Path) -> Path:
    """Writes the first rows of the data to a file."""
    file = work / "rows.json"
    file.write_text(json.dumps(json.loads(options.data.read_text())[: options.rows]))
    return file


def run(options: argparse.Namespace, words: list[str]) -> tuple[dict, list[dict]]:
    """Returns a training run's figures, and the lines of its `metrics.jsonl`."""
    adapter = ["adapter.rank=8", "adapter.alpha=16"] if options.mode == "lora" else ["adapter=null"]
    with tempfile.TemporaryDirectory() as work:
        file, out = rows(options, Path(work)), Path(work) / "run"
        said = machine.easyllm(
            *("train", "sft-lora", f"data.train=[{file}]", f"output={out}"),
            *("data.max_seq_len=512", "data.train_on=all", "save_every=0"),
            *(*adapter, *words, "--json"),
        )
        lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    return json.loads(said), lines


def peer(options: argparse.Namespace, work: Path) -> list[dict[str, float]]:
    """Runs TRL on the same rows, one process per setting."""
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
