"""Decoding from a GGUF file's packed form, compared with llama.cpp on the same file: a JSON row.

    python bench/llama_cpp.py --peer PYTHON [--types q4_0 q8_0 q4_k] [--rounds 3] [--record]

`--peer` is an interpreter that has `xllamacpp`. Q4_0, Q4_1 and Q8_0 are files of SmolLM2; Q4_K,
whose blocks do not fit SmolLM2's width, is a file of a random Llama (hidden size 768, feed-forward
2048, 24 layers). Both programs run in turn, each round in fresh processes; reported are the median
of the per-round ratios for each shape, and llama.cpp's own description of its build. Also measured
here: the same file on one thread, and the share of the read bandwidth that one stream reaches.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
import torch
from machine import SHARED

from easyllm.models import load_model, load_tokenizer
from easyllm.models.families import family_of
from easyllm.models.gguf_export import save_gguf
from easyllm.nn import Decoder

WIDE = ("q4_k", "q5_k", "q6_k")
SHAPES = [(1, 128, 128), (1, 1024, 64), (8, 128, 64), (32, 128, 64)]
"""Streams, prompt tokens and new tokens, as the peer's script has them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", help="interpreter with xllamacpp")
    parser.add_argument("--types", nargs="+", default=["q4_0", "q8_0", "q4_k"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--worker", nargs=2, metavar=("GGUF", "THREADS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(ours(options.worker[0], int(options.worker[1]))))
        return
    info = "import xllamacpp; print(xllamacpp.get_system_info())"
    system = subprocess.run([options.peer, "-c", info], capture_output=True, text=True).stdout
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for type in options.types:
            path = Path(folder) / f"{type}.gguf"
            write(type, path)
            results.append(compare(type, path, options))
            path.unlink()
    row = machine.row("llama_cpp", rounds=options.rounds, system=system.strip(), results=results)
    machine.finish(row, "llama_cpp", record=options.record)


def write(type: str, path: Path) -> None:
    """Writes a file of a type: of SmolLM2, or for K-quants of a random model."""
    model, tokenizer = load_model("smollm2", dtype="float32"), load_tokenizer("smollm2")
    if type in WIDE:
        vocab = model.config.vocab_size
        hf = {
            "model_type": "llama",
            "vocab_size": vocab,
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 24,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        model = Decoder(family_of("llama").read_config(hf))
        model.reset_parameters(std=0.03, generator=torch.Generator().manual_seed(0))
        model.requires_grad_(False).eval()
    save_gguf(model, path, type=type, tokenizer=tokenizer)


def compare(type: str, path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Runs both programs in turn; returns rates and ratios by shape."""
    mine, theirs = [], []
    for _ in range(options.rounds):
        theirs.append(peer(options.peer, path))
        mine.append(worker(path, 2))
        print(json.dumps({"type": type, "ours": mine[-1], "peer": theirs[-1]}), file=sys.stderr)
    one_thread = worker(path, 1)
    ratios = {}
    for shape in mine[0]["shapes"]:
        for rate in ("prefill", "decode"):
            pairs = [
                (m["shapes"][shape][rate], t[shape][rate])
                for m, t in zip(mine, theirs, strict=True)
            ]
            ratios[f"{shape} {rate}"] = round(statistics.median(a / b for a, b in pairs), 3)
    return {
        "type": type,
        "ratios": ratios,
        "ours": mine,
        "peer": theirs,
        "one_thread": one_thread,
    }


def worker(path: Path, threads: int) -> dict[str, Any]:
    words = [sys.executable, __file__, "--worker", str(path), str(threads)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def peer(python: str, path: Path) -> dict[str, dict[str, float]]:
    """Returns llama.cpp's rates by shape."""
    script = SHARED / "peers" / "xllamacpp_speed.py"
    done = subprocess.run(
        [python, str(script), str(path)], capture_output=True, text=True, check=True
    )
    found: dict[str, dict[str, float]] = {}
    for line in done.stdout.splitlines():
        if not line.startswith("{") or "streams" not in line:
            continue
        row = json.loads(line)
        shape = f"{row['streams']}x{row['prompt']}"
        rates = {"prefill": row["prefill_tok_s"], "decode": row["decode_tok_s"]}
        before = found.get(shape, rates)
        found[shape] = {name: max(rates[name], before[name]) for name in rates}
    return found


def ours(path: str, threads: int) -> dict[str, Any]:
    """Returns our rates by shape, and what one stream reads of the memory bandwidth."""
    torch.set_num_threads(threads)
    from easyllm.engine import LLM
    from easyllm.engine.rates import Shape, measure_rates

    llm = LLM(path, dtype="float32", quantize="gguf", prefix_caching=False, max_running=32)
    shapes = tuple(Shape(sequences=n, prompt=p, new=new) for n, p, new in SHAPES)
    rates, system = measure_rates(llm, shapes, repeats=2)
    step = llm.engine.step_name if hasattr(llm.engine, "step_name") else None
    return {
        "threads": threads,
        "read_gb_s": round(system["read_bytes_per_s"] / 1e9, 1),
        "step": step,
        "shapes": {
            f"{r.sequences}x{r.prompt}": {
                "prefill": round(r.prefill_tokens_per_s, 1),
                "decode": round(r.decode_tokens_per_s, 1),
                "read_share": round(r.read_share, 3),
            }
            for r in rates
        },
    }


if __name__ == "__main__":
    main()
