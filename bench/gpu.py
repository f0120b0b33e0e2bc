"""Pretraining and the engine on one GPU, as one JSON row.

    python bench/gpu.py --shards DIR [--tokenizer DIR] [--steps 16] [--parts train peer engine]
                        [--record]

`train`: steps of `recipes/pretrain-gpu.yaml` (359 million parameters, 524,288 tokens per step) on
token shards of the `smollm2` tokenizer, after 4 warm-up steps: the median rate, its share of the
matmul rate measured in the same process, and memory; also half as many steps with compiled
feed-forwards, and with `EASYLLM_KERNELS=0`, which is plain PyTorch. `peer`: forward and backward
pass of the same model in `transformers`, bf16, 16 rows of 2,048 tokens, without an optimizer.
`engine`: the same model, freshly initialised, on the engine's shapes; and `generate` of
`transformers` for 1 and 32 sequences.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import torch

from easyllm.core.yaml_text import read_yaml
from easyllm.engine import LLM
from easyllm.engine.rates import Shape, measure_rates
from easyllm.models import load_tokenizer, save_model
from easyllm.models.scratch import ScratchConfig, build_scratch, scratch_model_config
from easyllm.plan.machine import matmul_rate, read_rate

RECIPE = machine.HERE.parent / "recipes" / "pretrain-gpu.yaml"
SHAPES = tuple(
    Shape(sequences=s, prompt=p, new=n)
    for s, p, n in ((1, 128, 128), (1, 1024, 128), (32, 128, 128), (32, 1024, 128), (256, 128, 128))
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--tokenizer", default="smollm2")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--parts", nargs="+", default=["train", "peer", "engine"])
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    row = machine.row("gpu", gpu=gpu())
    if "train" in options.parts:
        half = f"max_steps={options.steps // 2}"
        row["train"] = {
            "kernels": train(options, "compile=false"),
            "kernels, feed-forwards compiled": train(options, "compile=true", half),
            "plain PyTorch": train(options, "compile=false", half, kernels=False),
        }
    with tempfile.TemporaryDirectory() as work:
        llm = engine(options, Path(work))
        if "peer" in options.parts:
            row["transformers_train"] = peer_step(Path(work))
        if "engine" in options.parts:
            rates, _ = measure_rates(llm, SHAPES)
            row["engine"] = [each.as_dict() for each in rates]
            row["transformers_generate"] = [peer_generate(Path(work), n) for n in (1, 32)]
    machine.finish(row, "gpu", record=options.record)


def recipe() -> dict[str, Any]:
    return read_yaml(RECIPE)


def gpu() -> dict[str, object]:
    return {
        "name": torch.cuda.get_device_name(),
        "triton": importlib.metadata.version("triton"),
        "cuda": torch.version.cuda,
        "bfloat16_matmul_tflops": round(matmul_rate(torch.bfloat16, "cuda") / 1e12),
        "reads_gb_s": round(read_rate("cuda") / 1e9),
    }


def train(options: argparse.Namespace, *words: str, kernels: bool = True) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "run"
        command = [sys.executable, "-m", "easyllm", "train", "pretrain-gpu"]
        command += [f"data.shards={options.shards}", f"model.tokenizer={options.tokenizer}"]
        command += [f"max_steps={options.steps}", "epochs=1000", "log_every=1", "eval_every=0"]
        command += ["save_every=0", "samples=null", "schedule.warmup_steps=4"]
        command += [f"output={out}", *words, "--json"]
        environment = os.environ | ({} if kernels else {"EASYLLM_KERNELS": "0"})
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [x for x in lines if "speed/mfu" in x]
    settled = steps[len(steps) // 2 :]
    return {
        "tokens_per_s": round(statistics.median(x["speed/tokens_per_s"] for x in settled)),
        "mfu": round(statistics.median(x["speed/mfu"] for x in settled), 3),
        "first_step_s": round(steps[0]["train/tokens"] / steps[0]["speed/tokens_per_s"], 1),
        "peak_gb": round(steps[-1]["memory/peak_bytes"] / 1e9, 1),
        "first_loss_nats": round(steps[0]["train/loss_nats"], 3),
        "last_loss_nats": round(steps[-1]["train/loss_nats"], 3),
    }


def engine(options: argparse.Namespace, work: Path) -> LLM:
    """Returns the recipe's model with fresh weights, and saves it as a folder for the peer."""
    wanted = recipe()["model"] | {"tokenizer": options.tokenizer}
    tokenizer = load_tokenizer(options.tokenizer)
    config = scratch_model_config(ScratchConfig(**wanted), tokenizer)
    model = build_scratch(config, seed=0).to("cuda", torch.bfloat16).eval().requires_grad_(False)
    save_model(model, work / "model", tokenizer=tokenizer)
    return LLM(
        model=model,
        tokenizer=tokenizer,
        max_running=256,
        max_step_tokens=8192,
        prefix_caching=False,
    )


def peer_step(work: Path) -> dict[str, float]:
    """Times a forward and backward pass of 16 rows of 2,048 tokens in `transformers` (median)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.bfloat16).to("cuda")
    ids = torch.randint(model.config.vocab_size, (16, 2048), device="cuda")
    seconds = []
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {
        "tokens_per_s": round(ids.numel() / statistics.median(seconds)),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1),
    }


def peer_generate(work: Path, count: int) -> dict[str, float]:
    """Times `generate` on `count` prompts of 128 tokens with 128 new ones, greedy, in bf16."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.bfloat16).to("cuda")
    ids = torch.randint(100, model.config.vocab_size, (count, 128), device="cuda")
    times = {}
    for new in (1, 129, 1, 129):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        torch.cuda.synchronize()
        times[new] = time.perf_counter() - start
    return {
        "sequences": count,
        "decode_tokens_per_s": round(count * 128 / (times[129] - times[1]), 1),
    }


if __name__ == "__main__":
    main()
