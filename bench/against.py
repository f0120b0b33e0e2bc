"""Compares this checkout with another one: bitwise equal results, and relative speed.

    git worktree add ../base COMMIT
    python bench/against.py --base ../base --bits [--only NAME ...]
    python bench/against.py --base ../base --speed [--only NAME ...] [--rounds 9] [--record]

`--bits`: 20 training steps of full fine-tuning and LoRA, in fp32 and bf16; prefill and decoding for
every weight and KV cache format, with and without the compiled step; deterministic mode; a run that
is killed and resumed, and one that the other checkout starts and this one resumes. Both checkouts
compute each item and reduce it to hashes; differing items are printed, with exit code 1.

`--speed`: training steps, decoding of 1 and 32 sequences, prefill, `--help` and the quickstart. The
two checkouts are measured alternately, so that other load on the machine slows both down. Reported
are the median of the per-round ratios (above 1: this checkout is faster) with its 95% confidence
interval, and the ratio of peak memory.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
from paired import Worker, answer_questions, median_ratio, peak_rss_mb

ROOT = Path(__file__).parents[1]
WEIGHTS = ("float32", "bfloat16", "int8", "int4")
CACHES = ("float32", "bfloat16", "int8", "int4")
STEPS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, help="the checkout to compare with")
    parser.add_argument("--here", type=Path, default=ROOT)
    parser.add_argument("--bits", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--only", nargs="+", default=[], help="parts of items' names")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        answer_questions(answer)
        return
    if options.base is None or not (options.bits or options.speed):
        parser.error("give --base, and --bits or --speed")
    if options.bits:
        compare_bits(options)
    if options.speed:
        results = [compare_speed(options, item) for item in chosen(SPEED, options.only)]
        row = machine.row("against", base=base_commit(options.base), results=results)
        machine.finish(row, "against", record=options.record)


def chosen(items: list[str], only: list[str]) -> list[str]:
    return [item for item in items if not only or any(part in item for part in only)]


def base_commit(base: Path) -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, cwd=base).stdout.strip()


def worker(checkout: Path) -> Worker:
    return Worker([sys.executable, __file__, "--worker"], checkout)


# ---- bitwise equality

BITS = [
    *(f"train {mode} {dtype}" for mode in ("full", "lora") for dtype in ("fp32", "bf16")),
    *(f"decode {weights} cache {cache}" for weights in WEIGHTS for cache in CACHES),
    *(f"decode {weights} plain steps" for weights in WEIGHTS),
    *(f"prefill {weights}" for weights in WEIGHTS),
    *(f"deterministic {weights}" for weights in WEIGHTS),
    "resumed",
    "begun by base, ended here",
]


def compare_bits(options: argparse.Namespace) -> None:
    """Prints one line per item; exits with code 1 if any item differs."""
    differing = []
    for item in chosen(BITS, options.only):
        start = time.perf_counter()
        if item == "resumed":
            pairs = [killed_run(options.here, options.here), whole_run(options.here)]
        elif item.startswith("begun"):
            pairs = [killed_run(options.base, options.here), whole_run(options.here)]
        else:
            pairs = []
            for side in (options.base, options.here):
                process = worker(side)
                pairs.append(process.ask({"bits": item}))
                process.close()
        other = [part for part in pairs[0] if pairs[0][part] != pairs[1][part]]
        differing += [item] if other else []
        took = time.perf_counter() - start
        where = f", in: {' '.join(other)}" if other else ""
        print(f"{'DIFFER' if other else 'equal '}  {item}{where}  ({took:.0f} s)", flush=True)
    if differing:
        sys.exit(f"{len(differing)} items differ: {', '.join(differing)}")


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Returns a worker's answer: hashes or seconds."""
    import torch

    torch.set_num_threads(2)
    if "bits" in question:
        return bits_of(question["bits"])
    return seconds_of(question["speed"], question["round"])


def bits_of(item: str) -> dict[str, str]:
    """Returns hashes of the parts of an item."""
    kind, *words = item.split()
    if kind == "train":
        with tempfile.TemporaryDirectory() as folder:
            train_steps(Path(folder), words[0], words[1], STEPS)
            return hash_run(Path(folder) / "run")
    if kind == "prefill":
        llm = engine(words[0])
        return {"long": digest(llm.score(ids(300, 1))), "short": digest(llm.score(ids(7, 2)))}
    options: dict[str, Any] = {}
    if kind == "deterministic":
        options = {"deterministic": True}
    elif words[1] == "cache":
        options = {"cache_dtype": words[2]}
    else:
        options = {"compiled_step": False}
    llm = engine(words[0], **options)
    from easyllm.engine import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    alone = llm.generate([ids(60, 3)], params)
    many = llm.generate([ids(20 + 9 * i, 4 + i) for i in range(8)], params)
    return {
        name: digest([[c.token_ids, c.logprobs] for c in done])
        for name, done in (("alone", alone), ("eight", many))
    }


def engine(weights: str, **options: Any) -> Any:
    from easyllm.engine import LLM

    quantize = weights if weights.startswith("int") else None
    dtype = "float32" if quantize else weights
    return LLM("smollm2", dtype=dtype, device="cpu", quantize=quantize, max_running=32, **options)


def ids(count: int, seed: int) -> list[int]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(100, 40000, (count,), generator=generator).tolist()


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def write_rows(path: Path, count: int) -> None:
    """Writes conversations of plain words, identical on every machine."""
    import random

    draws = random.Random(0)
    words = [
        "river",
        "stone",
        "cloud",
        "table",
        "green",
        "seven",
        "bright",
        "under",
        "water",
        "night",
        "small",
        "garden",
        "song",
    ]
    with path.open("w") as file:
        for number in range(count):
            ask, say = (" ".join(draws.choices(words, k=draws.randrange(8, 30))) for _ in "ab")
            file.write(json.dumps({"prompt": f"{number} {ask}", "completion": say}) + "\n")


def run_values(folder: Path, mode: str, dtype: str, steps: int, **changes: Any) -> dict[str, Any]:
    write_rows(folder / "rows.jsonl", 200)
    values = {
        "model": "smollm2",
        "data": {"train": [str(folder / "rows.jsonl")], "max_seq_len": 256},
        "adapter": {"kind": "lora", "rank": 8} if mode == "lora" else None,
        "optimizer": {"kind": "adamw", "learning_rate": 1e-3 if mode == "lora" else 2e-5},
        "batch_size": 8,
        "micro_batch_tokens": 512,
        "max_steps": steps,
        "epochs": 9,
        "precision": dtype,
        "save_every": 0,
    }
    return values | changes


def train_steps(folder: Path, mode: str, dtype: str, steps: int, **changes: Any) -> None:
    from easyllm.train import TrainConfig, train

    values = run_values(folder, mode, dtype, steps, **changes)
    train(TrainConfig.model_validate(values), folder / "run")


def hash_run(run: Path) -> dict[str, str]:
    """Returns hashes of the trained tensors, and of each step's loss and gradient norm."""
    from safetensors.numpy import load_file

    (file,) = [p for p in run.glob("*/*.safetensors") if p.parent.name in ("adapter", "model")]
    whole = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        whole.update(name.encode() + tensor.tobytes())
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    steps = [
        [line["train/loss_nats"], line["train/grad_norm"]]
        for line in lines
        if "train/loss_nats" in line
    ]
    return {"weights": whole.hexdigest(), "steps": digest(steps)}


RUN = ("lora", "fp32", 12)


def whole_run(checkout: Path) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        start_run(checkout, Path(folder)).wait()
        return hash_run(Path(folder) / "run")


def killed_run(first: Path, then: Path) -> dict[str, str]:
    """Returns the hashes of a run that `first` starts, that is killed, and that `then` resumes."""
    with tempfile.TemporaryDirectory() as folder:
        process = start_run(first, Path(folder))
        metrics = Path(folder) / "run" / "metrics.jsonl"
        while process.poll() is None:
            if metrics.exists() and metrics.read_text().count("train/loss_nats") >= 5:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.01)
        process.wait()
        assert not (Path(folder) / "run" / "manifest.json").exists(), "it was faster than the kill"
        start_run(then, Path(folder)).wait()
        return hash_run(Path(folder) / "run")


def start_run(checkout: Path, folder: Path) -> "subprocess.Popen[bytes]":
    import yaml

    recipe = folder / "recipe.yaml"
    if not recipe.exists():
        recipe.write_text(yaml.safe_dump(run_values(folder, *RUN, save_every=1)))
    command = [sys.executable, "-m", "easyllm", "train", str(recipe), f"output={folder / 'run'}"]
    env = {**os.environ, "PYTHONPATH": str(Path(checkout).resolve() / "src")}
    return subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


# ---- speed

SPEED = [
    *(f"train {mode} {dtype}" for mode in ("lora", "full") for dtype in ("fp32", "bf16")),
    *(f"decode {rows} {weights}" for weights in WEIGHTS for rows in (1, 32)),
    *(f"prefill {weights}" for weights in ("float32", "bfloat16", "int4")),
    "--help",
    "quickstart",
]


def compare_speed(options: argparse.Namespace, item: str) -> dict[str, Any]:
    """Returns the medians of both sides, and the median ratio over the rounds."""
    sides = {"base": options.base, "here": options.here}
    kept = not item.startswith(("train", "--help", "quickstart"))
    workers = {name: worker(side) for name, side in sides.items()} if kept else {}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    first = 0 if item == "quickstart" else -1  # round -1 is a warm-up
    for number in range(first, options.rounds):
        for name in list(sides) if number % 2 else list(sides)[::-1]:
            if item in ("--help", "quickstart"):
                figures = command_seconds(sides[name], item)
            elif item.startswith("train"):
                # a process for each run: a checkout may keep memory of the runs before
                process = worker(sides[name])
                figures = process.ask({"speed": item, "round": number})
                process.close()
            else:
                figures = workers[name].ask({"speed": item, "round": number})
            if number >= 0:
                found[name].append(figures)
    for process in workers.values():
        process.close()
    pairs = list(zip(found["base"], found["here"], strict=True))
    result = {
        "item": item,
        "base_seconds": round(statistics.median(a["seconds"] for a, _ in pairs), 3),
        "here_seconds": round(statistics.median(b["seconds"] for _, b in pairs), 3),
        "ratio": median_ratio([a["seconds"] / b["seconds"] for a, b in pairs]),
    }
    if "peak_rss_mb" in found["here"][0]:
        peaks = [max(f["peak_rss_mb"] for f in found[name]) for name in ("here", "base")]
        result["memory_ratio"] = round(peaks[0] / peaks[1], 3)
    print(json.dumps(result), file=sys.stderr, flush=True)
    return result


_LOADED: dict[str, Any] = {}


def seconds_of(item: str, number: int) -> dict[str, float]:
    """Returns a worker's measurement."""
    kind, *words = item.split()
    if kind == "train":
        with tempfile.TemporaryDirectory() as folder:
            train_steps(Path(folder), words[0], words[1], 4, batch_size=None, batch_tokens=1024)
            seconds = [
                line["train/tokens"] / line["speed/tokens_per_s"]
                for text in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
                if "speed/tokens_per_s" in (line := json.loads(text))
            ]
        return {"seconds": sum(seconds[1:]), "peak_rss_mb": peak_rss_mb()}
    from easyllm.engine import SamplingParams

    weights = words[-1]
    if weights not in _LOADED:
        _LOADED[weights] = engine(weights, prefix_caching=False)
    llm = _LOADED[weights]
    rows = 1 if kind == "prefill" else int(words[0])
    length, new = (1024, 1) if kind == "prefill" else (128, 65)
    prompts = [ids(length, 100 * number + row + 1) for row in range(rows)]
    times = []
    for count in (1, new) if kind == "decode" else (1,):
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        start = time.perf_counter()
        llm.generate(prompts, params)
        times.append(time.perf_counter() - start)
    return {
        "seconds": times[-1] - (times[0] if len(times) > 1 else 0),
        "peak_rss_mb": peak_rss_mb(),
    }


def command_seconds(checkout: Path, item: str) -> dict[str, float]:
    """Measures a command in a separate process."""
    output = tempfile.mkdtemp()
    words = [item] if item == "--help" else [item, "--no-serve", f"output={output}/run"]
    env = {**os.environ, "PYTHONPATH": str(Path(checkout).resolve() / "src")}
    start = time.perf_counter()
    command = [sys.executable, "-m", "easyllm", *words]
    subprocess.run(command, env=env, check=True, capture_output=True)
    taken = time.perf_counter() - start
    shutil.rmtree(output)
    return {"seconds": taken}


if __name__ == "__main__":
    main()
