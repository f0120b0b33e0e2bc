"""Engine rates compared with alternative engines on the same shapes, as one JSON row.

    python bench/engine.py [--variants int4 int8 float32] [--llama PYTHON] [--transformers PYTHON]
                           [--vllm PYTHON] [--rounds 2] [--record]

SmolLM2; each peer is an interpreter that has the library, and runs a script next to this checkout.
Our engine and the peers run alternately, `rounds` times, and the highest rate per shape is taken
for each: load on a shared machine can only slow a run down. Also measured: the time from starting a
command to its first token, and the KL divergence of quantized weights from the fp32 model, in nats
per token of WikiText-2's validation text.
"""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import machine
import torch
from machine import SHARED, easyllm

from easyllm.models import load_model, load_tokenizer
from easyllm.nn import attention
from easyllm.nn.attention import attention as exact_attention
from easyllm.quant import quantize_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", nargs="+", default=["int4", "int8", "float32"])
    parser.add_argument("--llama", help="interpreter with llama_cpp")
    parser.add_argument("--transformers", help="interpreter with transformers")
    parser.add_argument("--transformers-dtypes", nargs="+", default=["f32", "bf16"])
    parser.add_argument("--vllm", help="interpreter with vllm")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--rounds", type=int, default=2, help="0: only what follows the rates")
    options = parser.parse_args()
    runs: dict[str, list[list[dict[str, Any]]]] = {}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "smollm2"
        easyllm("convert", "smollm2", str(folder))
        for _ in range(options.rounds):
            for name, measure in contenders(options, folder).items():
                runs.setdefault(name, []).append(measure())
                print(name, json.dumps(runs[name][-1]), file=sys.stderr, flush=True)
    results = {name: highest(found) for name, found in runs.items()}
    row = machine.row(
        "engine",
        rounds=options.rounds,
        ours={v: results.pop(v) for v in options.variants if v in results},
        peers=results,
        first_token_s={v: first_token(v) for v in options.variants},
        kl_nats={
            name: divergence(v, kept)
            for v in options.variants
            if v.startswith("int")
            for name, kept in ((v, torch.float32), (f"{v}, bf16 keys and values", torch.bfloat16))
        },
    )
    machine.finish(row, "engine", record=options.record)


def contenders(
    options: argparse.Namespace, folder: Path
) -> dict[str, Callable[[], list[dict[str, Any]]]]:
    """Returns everything to be measured, in the order within a round."""
    found: dict[str, Callable[[], list[dict[str, Any]]]] = {}
    if options.llama:
        gguf = json.loads(easyllm("doctor", "--json"))["model smollm2"]
        found["llama.cpp"] = partial(script, options.llama, "llama_cpp_speed.py", gguf)
    for variant in options.variants:
        found[variant] = partial(ours_of, variant)
    if options.vllm:
        found["vllm"] = partial(script, options.vllm, "vllm_cpu.py", str(folder))
    for dtype in options.transformers_dtypes if options.transformers else ():
        words = (options.transformers, "hf_generate.py", str(folder), dtype)
        found[f"transformers {dtype}"] = partial(script, *words)
    return found


def ours_of(variant: str) -> list[dict[str, float]]:
    return json.loads(easyllm("bench", "engine", "smollm2", *words_of(variant), "--json"))["rates"]


def words_of(variant: str) -> list[str]:
    """Returns the command-line options that select a weight format."""
    return ["--dtype" if "float" in variant else "--quantize", variant]


def highest(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Returns the highest rates over all rounds, by shape."""
    merged = []
    for same in zip(*runs, strict=True):
        rates = [k for k in same[0] if k.endswith(("_per_s", "_share", "tok_s"))]
        merged.append(same[0] | {k: max(r[k] for r in same) for k in rates})
    return merged


def first_token(variant: str) -> float:
    """Returns the minimum of three times from starting a command to its first token, in seconds."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        easyllm(
            "generate",
            "smollm2",
            "The capital of France is",
            "--max-tokens",
            "1",
            *words_of(variant),
        )
        times.append(time.perf_counter() - start)
    return round(min(times), 2)


@torch.inference_mode()
def divergence(scheme: str, kept: torch.dtype, *, tokens: int = 8192, window: int = 512) -> float:
    """Returns the KL divergence from the fp32 model, in nats per token, over windows of a text.

    Args:
        scheme: quantization of the weights.
        kept: dtype of the keys and values.
        tokens: number of tokens.
        window: tokens per forward pass.
    """
    text = (SHARED / "data" / "wikitext2_valid.txt").read_text(encoding="utf-8")
    ids = load_tokenizer("smollm2").encode(text)[:tokens]
    full = load_model("smollm2", dtype="float32")
    rounded = quantize_weights(copy.deepcopy(full), scheme)
    total = 0.0
    for start in range(0, len(ids), window):
        part = ids[start : start + window]
        p = full.logits(part).log_softmax(-1)
        with patch.object(attention, "attention", partial(attention_over, kept)):
            q = rounded.logits(part).log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
    return round(total / len(ids), 5)


def attention_over(
    kept: torch.dtype, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> torch.Tensor:
    """Returns attention over keys and values rounded to the dtype of the cache."""
    return exact_attention(q, k.to(kept).to(k), v.to(kept).to(v), *rest)


def script(python: str, name: str, *words: str) -> list[dict[str, Any]]:
    """Returns the JSON rows printed by a peer's script."""
    command = [python, str(SHARED / "peers" / name), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


if __name__ == "__main__":
    main()
