"""The engine beside what users would pick instead, on the same shapes in one sitting, as one JSON row.

    python bench/engine.py [--variants int4 int8 float32] [--llama PYTHON] [--transformers PYTHON] [--vllm PYTHON] [--record]

SmolLM2; each peer is an interpreter that has the library, and runs its script beside this checkout. Ours runs before and after
the peers, and the slower of the two counts, so that a machine that changes its speed meanwhile is no help. Also: how long a
command takes from its start to its first token.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
from machine import SHARED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", nargs="+", default=["int4", "int8", "float32"])
    parser.add_argument("--llama", help="interpreter with llama_cpp")
    parser.add_argument("--transformers", help="interpreter with transformers")
    parser.add_argument("--transformers-dtypes", nargs="+", default=["f32", "bf16"])
    parser.add_argument("--vllm", help="interpreter with vllm")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    ours = {v: [ours_of(v)] for v in options.variants}
    peers: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "smollm2"
        easyllm("convert", "smollm2", str(folder))
        if options.llama:
            gguf = json.loads(easyllm("doctor", "--json"))["model smollm2"]
            peers["llama.cpp"] = script(options.llama, "llama_cpp_speed.py", gguf)
        for dtype in options.transformers_dtypes if options.transformers else ():
            found = script(options.transformers, "hf_generate.py", str(folder), dtype)
            peers[f"transformers {dtype}"] = found
        if options.vllm:
            peers["vllm"] = script(options.vllm, "vllm_cpu.py", str(folder))
    if peers:
        for variant, runs in ours.items():
            runs.append(ours_of(variant))
    results = {v: slower(runs) for v, runs in ours.items()}
    row = machine.row(
        "engine",
        ours=results,
        peers=peers,
        first_token_s={v: first_token(v) for v in options.variants},
    )
    machine.finish(row, "engine", record=options.record)


def ours_of(variant: str) -> list[dict[str, float]]:
    words = (
        ["--dtype", variant] if variant.startswith(("float", "bfloat")) else ["--quantize", variant]
    )
    return json.loads(easyllm("bench", "engine", "smollm2", *words, "--json"))["rates"]


def slower(runs: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """Of each shape's rates the lower."""
    rates = [k for k in runs[0][0] if k.endswith(("_per_s", "_share"))]
    merged = []
    for same in zip(*runs, strict=True):
        merged.append(same[0] | {k: min(r[k] for r in same) for k in rates})
    return merged


def first_token(variant: str) -> float:
    """Seconds from the command to the end of one token, the least of three."""
    words = [] if variant == "float32" else ["--quantize", variant]
    times = []
    for _ in range(3):
        start = time.perf_counter()
        easyllm("generate", "smollm2", "The capital of France is", "--max-tokens", "1", *words)
        times.append(time.perf_counter() - start)
    return round(min(times), 2)


def easyllm(*words: str) -> str:
    command = [sys.executable, "-m", "easyllm", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def script(python: str, name: str, *words: str) -> list[dict[str, Any]]:
    """The JSON rows a peer's script prints."""
    command = [python, str(SHARED / "peers" / name), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


if __name__ == "__main__":
    main()
