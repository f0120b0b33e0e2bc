"""Decoding of many sequences with unquantized weights, in this checkout and another; one JSON row.

    python bench/decode32.py --base CHECKOUT [--dtypes float32 bfloat16] [--rounds 9] [--avx2]
                             [--peer-python PYTHON --peer-model FOLDER] [--record]

SmolLM2, 32 sequences of 128 prompt tokens that generate 128 tokens each, greedily. Each side is a
process with the model loaded. The sides are measured alternately and a ratio is taken per round, so
that other load on the machine slows both down. Reported are the median of the ratios and the
interval between the order statistics that contain the true median with at least 95% probability.
`--avx2` builds the kernels for AVX2 only and restricts PyTorch to it. The peer is `generate` of
`transformers`, on the same prompts, from a folder written by `easyllm convert smollm2 FOLDER`.
`cpu_ratio` is the ratio of CPU times, which time spent waiting for other processes does not change.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import machine
from paired import Worker, answer_questions, median_ratio, peak_rss_mb

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, help="the checkout to compare with")
    parser.add_argument("--here", type=Path, default=ROOT)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--shape", type=int, nargs=3, default=[32, 128, 128])
    parser.add_argument("--avx2", action="store_true")
    parser.add_argument("--peer-python", help="interpreter with transformers")
    parser.add_argument("--peer-model", help="folder with the model in Hugging Face's format")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--worker", nargs=2, metavar=("KIND", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    if options.base is None:
        parser.error("--base is needed: the checkout to compare with")
    if (options.peer_python is None) != (options.peer_model is None):
        parser.error("--peer-python and --peer-model go together")
    results = [compare(options, dtype) for dtype in options.dtypes]
    row = machine.row("decode32", shape=options.shape, avx2=options.avx2, results=results)
    machine.finish(row, "decode32", record=options.record)


def compare(options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Returns the rates of both sides and of the peer, and the ratios of each round."""
    sides = {"base": (sys.executable, options.base), "here": (sys.executable, options.here)}
    if options.peer_python:
        sides["peer"] = (options.peer_python, options.here)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    workers = {name: worker(options, name, dtype, *side) for name, side in sides.items()}
    try:
        for number in range(options.rounds + 1):  # the first round is a warm-up
            order = list(workers) if number % 2 else list(workers)[::-1]
            for name in order:
                figures = workers[name].ask(number)
                if number:
                    found[name].append(figures)
                    print(dtype, name, json.dumps(figures), file=sys.stderr, flush=True)
    finally:
        for process in workers.values():
            process.close()
    result: dict[str, Any] = {"dtype": dtype}
    for name, runs in found.items():
        result[f"{name}_tokens_per_s"] = round(
            statistics.median(r["tokens_per_s"] for r in runs), 1
        )
        result[f"{name}_peak_rss_mb"] = max(r["peak_rss_mb"] for r in runs)
        if name != "here":
            pairs = list(zip(found["here"], runs, strict=True))
            result[f"ratio_to_{name}"] = median_ratio(
                [a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs]
            )
            result[f"cpu_ratio_to_{name}"] = median_ratio(
                [b["cpu_s"] / a["cpu_s"] for a, b in pairs]
            )
    return result


def worker(
    options: argparse.Namespace, name: str, dtype: str, python: str, checkout: Path
) -> Worker:
    """Starts a process that measures on request."""
    command = [python, __file__, "--worker", "peer" if name == "peer" else "ours", dtype]
    command += ["--shape", *map(str, options.shape), *(["--avx2"] if options.avx2 else [])]
    command += ["--peer-model", options.peer_model] if name == "peer" else []
    narrow = {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
    }
    return Worker(command, checkout, narrow if options.avx2 else None)


def work(options: argparse.Namespace) -> None:
    kind, dtype = options.worker
    if options.avx2 and kind == "ours":
        build_for_avx2()
    import torch

    torch.set_num_threads(2)
    measure = peer(options.peer_model, dtype) if kind == "peer" else ours(dtype, options.shape[0])
    next(measure)
    count, length, new = options.shape

    def answer(seed: int) -> dict[str, float]:
        torch.manual_seed(seed)
        wall, cpu = measure.send((torch.randint(100, 40000, (count, length)), new))
        return {
            "tokens_per_s": round(count * (new - 1) / wall, 1),
            "cpu_s": round(cpu, 3),
            "peak_rss_mb": peak_rss_mb(),
        }

    answer_questions(answer)


def build_for_avx2() -> None:
    """Restricts kernels to AVX2; must run before they are built or CPU features are queried."""
    from easyllm.core import device
    from easyllm.ops.kernels import build

    build.FLAGS = tuple("-march=x86-64-v3" if f == "-march=native" else f for f in build.FLAGS)
    device.cpu_features = build.cpu_features = lambda: frozenset({"avx2"})


def ours(dtype: str, count: int) -> Any:
    """Yields wall and CPU seconds for all tokens after each sequence has its first one."""
    from easyllm.engine import LLM, Request, SamplingParams

    llm = LLM("smollm2", dtype=dtype, device="cpu", max_running=count, cache_gb=1.0)
    spent: Any = None
    while True:
        prompts, new = yield spent
        params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
        for ids in prompts.tolist():
            llm.engine.add(Request(prompt_ids=tuple(ids), params=params))
        seen: set[int] = set()
        while len(seen) < count:
            seen |= {event.request_id for event in llm.engine.step()}
        with clock() as spent:
            while llm.engine.busy:
                llm.engine.step()


def peer(folder: str, dtype: str) -> Any:
    """Yields the same for `generate`, as the difference to generating a single token."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    spent: Any = None
    while True:
        ids, new = yield spent
        times = []
        for length in (1, new):
            with torch.inference_mode(), clock() as spent:
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=length,
                    min_new_tokens=length,
                    do_sample=False,
                )
            times.append(spent)
        spent = [whole - first for first, whole in zip(*times, strict=True)]


@contextmanager
def clock() -> Iterator[list[float]]:
    """Yields a list that contains wall and CPU seconds once the block has ended."""
    spent: list[float] = []
    start, cpu = time.perf_counter(), time.process_time()
    yield spent
    spent += [time.perf_counter() - start, time.process_time() - cpu]


if __name__ == "__main__":
    main()
