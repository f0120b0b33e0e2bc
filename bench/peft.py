"""Parameter-efficient methods on SmolLM2: speed, memory, score and forgetting; JSON rows.

    python bench/peft.py methods [--only lora dora ...] [--epochs 1] [--seeds 1] [--record]
    python bench/peft.py peer --peer PYTHON [--variant qlora|dora] [--rows 128] [--record]
    python bench/peft.py order [--only lora dora ...] [--steps 30] [--record]
    python bench/peft.py loraplus [--width 576] [--steps 30] [--record] [--plot FILE.svg]
    python bench/peft.py paged [--record]
    python bench/peft.py nf4 [--rows 128] [--record]

`methods` trains each method on the quickstart's facts, one process each, and prints trainable
parameters, peak memory, tokens/s, the share of held-out questions answered (recall), and the loss
on unrelated questions before and after (forgetting). `peer` runs our QLoRA or DoRA in turn with
TRL, peft and bitsandbytes on 128 Alpaca rows (an interpreter that has them). `order` ranks
the methods by held-out loss, each at the best of three learning rates, with its spread over three
seeds. `loraplus` compares LoRA with LoRA+ at ratios 4 and 16, each at the best of five learning
rates over three seeds, on a model of this width that it pretrains for the purpose.
`paged` compares full fine-tuning with and without `optimizer.paged`. `nf4` trains LoRA on the full
weights, on NF4 rounded to nearest, and on NF4 by GPTQ, calibrated on Alpaca rows that are not held
out. `--record` appends the rows to
`bench/results/peft.jsonl`.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
from machine import SHARED

RECIPES = machine.HERE.parent / "recipes" / "data"
LOW_RANK = ("adapter.rank=16", "adapter.alpha=32")
METHODS: dict[str, tuple[str, ...]] = {
    "lora": LOW_RANK,
    "lora+": (*LOW_RANK, "adapter.rate_ratio=4", "optimizer.learning_rate=1e-3"),
    "rslora": (*LOW_RANK, "adapter.rslora=true", "optimizer.learning_rate=1e-3"),
    "dora": ("adapter.kind=dora", *LOW_RANK),
    "pissa": ("adapter.kind=pissa", *LOW_RANK, "optimizer.learning_rate=5e-4"),
    "adalora": ("adapter.kind=adalora", "adapter.rank=16", "optimizer.learning_rate=2e-2"),
    "qlora": (*LOW_RANK, "quantize=nf4"),
    "lora_fa": ("adapter.kind=lora_fa", *LOW_RANK, "optimizer.learning_rate=4e-3"),
    "vera": ("adapter.kind=vera", "optimizer.learning_rate=1e-1"),
    "oft": ("adapter.kind=oft", "optimizer.learning_rate=2e-3"),
    "miss": ("adapter.kind=miss", "optimizer.learning_rate=2e-3"),
    "ia3": ("adapter.kind=ia3", "optimizer.learning_rate=2e-2"),
    "bitfit": (
        "adapter.kind=bitfit",
        "adapter.parameters=['*norm*']",
        "optimizer.learning_rate=2e-2",
    ),
    "prompt": ("adapter.kind=prompt", "optimizer.learning_rate=2e-2"),
    "ptuning": ("adapter.kind=ptuning", "optimizer.learning_rate=2e-3"),
    "prefix": ("adapter.kind=prefix", "optimizer.learning_rate=1e-2"),
    "full": ("adapter=null", "optimizer.learning_rate=2e-4"),
}
"""The overrides of each method on the quickstart's training, with a learning rate that suits it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "what", choices=["methods", "peer", "order", "loraplus", "paged", "nf4", "evaluate"]
    )
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--peer", help="Python interpreter with trl, peft and bitsandbytes")
    parser.add_argument("--variant", choices=["qlora", "dora"], default="qlora")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--model", default="smollm2", help="evaluate: the model")
    options = parser.parse_args()
    if options.what == "evaluate":
        print(json.dumps(scores(options.model)))
        return
    runs = {"methods": methods, "peer": against_peer, "order": order}
    runs |= {"loraplus": loraplus, "paged": paged, "nf4": nf4}
    for row in runs[options.what](options):
        machine.finish(row, "peft", record=options.record)


# ---- every method on one task


def methods(options: argparse.Namespace) -> Any:
    """Yields a row for each method and seed, after one for the base."""
    base = evaluated("smollm2")
    yield machine.row("peft-base", **base)
    for seed in range(options.seeds):
        for name in options.only:
            yield machine.row(f"peft-{name}", **one_method(name, seed, options), seed=seed)


def one_method(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Trains one method on the quickstart's facts and evaluates the result."""
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "run"
        files = f"data.train=[{RECIPES}/easyllm_facts_train.jsonl,{RECIPES}/rehearsal.jsonl]"
        figures, lines = train(
            out,
            *(files, "data.max_seq_len=256", f"retention=[{RECIPES}/unrelated.jsonl]"),
            *("optimizer.learning_rate=2e-3", "schedule.warmup_ratio=0.05", "batch_size=24"),
            *(f"epochs={options.epochs}", "save_every=0", f"seed={seed}", *METHODS[name]),
        )
        part = out / ("model" if name == "full" else "adapter")
        steps = [line for line in lines if "speed/tokens_per_s" in line]
        return {
            "trained_parameters": figures["trained_parameters"],
            "tokens_per_s": rate(steps),
            "peak_rss_gb": round(figures["peak_rss_bytes"] / 1e9, 2),
            "last_loss_nats": round(steps[-1]["train/loss_nats"], 4),
            "retention_before": round(figures["retention_loss_nats_before"], 4),
            "retention_after": round(figures["retention_loss_nats"], 4),
            **evaluated(str(part)),
        }


def evaluated(model: str) -> dict[str, float]:
    """Runs `evaluate` in a process of its own, so that its memory counts for nothing else."""
    command = [sys.executable, __file__, "evaluate", "--model", model]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def scores(model: str) -> dict[str, float]:
    """Returns the recall and the loss on the held-out questions."""
    from easyllm.engine import LLM
    from easyllm.evaluate import evaluate_answers

    report = evaluate_answers(LLM(model), RECIPES / "easyllm_facts_heldout.jsonl")
    assert report.recall is not None, "answers are generated"
    return {"recall": round(report.recall, 3), "heldout_loss_nats": round(report.loss_nats, 4)}


def train(out: Path, *words: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns the figures of a training run and the lines of its `metrics.jsonl`."""
    said = machine.easyllm("train", "sft-lora", f"output={out}", *words, "--json")
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    return json.loads(said), lines


def rate(steps: list[dict[str, Any]]) -> float:
    """Returns the tokens per second of all steps together."""
    tokens = sum(step["train/tokens"] for step in steps)
    return round(tokens / sum(s["train/tokens"] / s["speed/tokens_per_s"] for s in steps), 1)


# ---- the order of methods


def order(options: argparse.Namespace) -> Any:
    """Yields a row for each method: its losses at three rates, and at the best over three seeds."""
    for name in options.only:
        adapter, rate, quantize = settings(name)
        with tempfile.TemporaryDirectory() as folder:

            def run(
                learning_rate: float,
                seed: int,
                work: Path = Path(folder),
                adapter: dict[str, Any] | None = adapter,
                quantize: str | None = quantize,
            ) -> tuple[float, float]:
                steps = options.steps
                return short_run(work, "smollm2", adapter, learning_rate, seed, steps, quantize)

            by_rate = {factor * rate: run(factor * rate, 0) for factor in (0.3, 1, 3)}
            best = min(by_rate, key=lambda each: by_rate[each][0])
            found = [by_rate[best], *(run(best, seed) for seed in (1, 2))]
        heldout, retention = ([each[i] for each in found] for i in range(2))
        yield machine.row(
            f"peft-order-{name}",
            steps=options.steps,
            losses_by_rate={f"{each:g}": losses[0] for each, losses in by_rate.items()},
            learning_rate=best,
            heldout_loss_nats=heldout,
            heldout_mean=round(statistics.mean(heldout), 4),
            heldout_spread=round(statistics.stdev(heldout), 4),
            retention_loss_nats=retention,
        )


def settings(name: str) -> tuple[dict[str, Any] | None, float, str | None]:
    """Returns a method's adapter, its learning rate, and what its base is quantized to."""
    from easyllm.core.config import apply_overrides

    values = apply_overrides({"adapter": {"kind": "lora"}}, METHODS[name])
    rate = values.get("optimizer", {}).get("learning_rate", 2e-3)
    return values["adapter"], rate, values.get("quantize")


# ---- in turn with TRL


def against_peer(options: argparse.Namespace) -> Any:
    """Yields one row: ours before and after TRL's, on the same rows.

    For QLoRA, the row also has our LoRA on the dense base: how much memory the weights save, and
    what rounding them costs, on the training rows and on 64 others.
    """
    row = machine.row(f"peft-{options.variant}-trl")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        row["ours"] = [alpaca(options, work / "first")]
        model = work / "smollm2"
        machine.easyllm("convert", "smollm2", str(model))
        script = SHARED / "peers" / "trl_qlora.py"
        data = SHARED / "data" / "alpaca_en_demo.json"
        command = [options.peer, str(script), str(model), str(data), str(options.rows)]
        command += ["dora"] if options.variant == "dora" else []
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row["trl"] = json.loads(done.stdout.strip().splitlines()[-1])
        row["ours"].append(alpaca(options, work / "second"))
        if options.variant == "qlora":
            row["lora"] = alpaca(options, work / "dense", quantize="null")
    slower = min(each["tokens_per_s"] for each in row["ours"])
    row["ratio"] = round(slower / row["trl"]["tok_s"], 2)
    most = max(each["peak_rss_gb"] for each in row["ours"])
    row["memory_ratio"] = round(most * 1000 / row["trl"]["rss_mb"], 2)
    yield row


def nf4(options: argparse.Namespace) -> Any:
    """Yields one row: LoRA after an epoch on three bases."""
    data = json.loads((SHARED / "data" / "alpaca_en_demo.json").read_text())
    row = machine.row("peft-nf4", rows=options.rows)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        row["full weights"] = alpaca(options, work / "full", quantize="null")
        row["nf4"] = alpaca(options, work / "nearest")
        text, base = work / "text.json", work / "base"
        text.write_text(json.dumps(data[: options.rows] + data[options.rows + 64 :]))
        flags = ("--method", "gptq-nf4", "--data", str(text))
        started = time.perf_counter()
        machine.easyllm("quantize", "smollm2", str(base), *flags)
        row["quantize_seconds"] = round(time.perf_counter() - started)
        row["gptq-nf4"] = alpaca(options, work / "gptq", quantize="null", model=str(base))
    full = row["full weights"]["eval_loss_nats"]
    for name in ("nf4", "gptq-nf4"):
        row[f"{name} above full"] = round(row[name]["eval_loss_nats"] / full - 1, 4)
    yield row


def alpaca(
    options: argparse.Namespace, out: Path, quantize: str = "nf4", model: str = "smollm2"
) -> dict[str, float]:
    """One epoch on the first Alpaca rows, in the configuration of the peer's script."""
    data = json.loads((SHARED / "data" / "alpaca_en_demo.json").read_text())
    out.mkdir()
    file, others = out / "rows.json", out / "others.json"
    file.write_text(json.dumps(data[: options.rows]))
    others.write_text(json.dumps(data[options.rows : options.rows + 64]))
    kind = ["adapter.kind=dora"] if options.variant == "dora" else []
    figures, lines = train(
        out / "run",
        *(f"data.train=[{file}]", "data.max_seq_len=512", "data.train_on=all", "save_every=0"),
        *("batch_size=4", "epochs=1", "optimizer.learning_rate=2e-4"),
        *(f"model={model}", f"quantize={quantize}", "adapter.rank=8", "adapter.alpha=16", *kind),
        *(f"data.eval=[{others}]", "eval_every=0"),
    )
    steps = [line for line in lines if "speed/tokens_per_s" in line]
    return {
        "tokens_per_s": rate(steps),
        "peak_rss_gb": round(figures["peak_rss_bytes"] / 1e9, 2),
        "last_loss_nats": round(steps[-1]["train/loss_nats"], 4),
        "mean_loss_nats": round(statistics.mean(s["train/loss_nats"] for s in steps), 4),
        "eval_loss_nats": round(figures["eval_loss_nats"], 4),
    }


# ---- LoRA+


def loraplus(options: argparse.Namespace) -> Any:
    """Yields one row: the last losses of LoRA and LoRA+ at each learning rate and seed."""
    rates = [2e-4, 5e-4, 1e-3, 2e-3, 5e-3]
    found: dict[str, dict[float, list[float]]] = {}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        base = pretrained(Path(folder), options.width)
        for ratio in (1, 4, 16):
            for learning_rate in rates:
                adapter = {"kind": "lora", "rate_ratio": ratio}
                losses = [
                    short_run(
                        Path(folder), base, adapter, learning_rate, seed, options.steps, batch=4
                    )[0]
                    for seed in range(3)
                ]
                found.setdefault(f"ratio {ratio}", {})[learning_rate] = losses
    best = {
        name: min((statistics.mean(losses), learning_rate) for learning_rate, losses in by.items())
        for name, by in found.items()
    }
    if options.plot is not None:
        from plot import write_lines

        lines = {
            "LoRA" if name == "ratio 1" else f"LoRA+, {name}": [
                (float(i), statistics.mean(by[r])) for i, r in enumerate(rates)
            ]
            for name, by in found.items()
        }
        title = f"LoRA+ at width {options.width}: loss after {options.steps} steps"
        names = ", ".join(f"{i}: {r:g}" for i, r in enumerate(rates))
        y = "held-out loss, nats per token, mean of three seeds"
        write_lines(
            options.plot,
            title,
            lines,
            x_title=f"learning rate ({names})",
            y_title=y,
            from_zero=False,
        )
    yield machine.row(
        "peft-loraplus",
        width=options.width,
        steps=options.steps,
        losses={name: {str(r): ls for r, ls in by.items()} for name, by in found.items()},
        best={name: {"loss_nats": v, "learning_rate": r} for name, (v, r) in best.items()},
        seconds=round(time.perf_counter() - start),
    )


def short_run(
    work: Path,
    base: str,
    adapter: dict[str, Any] | None,
    learning_rate: float,
    seed: int,
    steps: int,
    quantize: str | None = None,
    batch: int = 8,
) -> tuple[float, float]:
    """Returns the held-out and the retention loss of a short run on the quickstart's facts."""
    from easyllm.train import TrainConfig
    from easyllm.train import train as run_training

    config = {
        "model": base,
        "data": {
            "train": [f"{RECIPES}/easyllm_facts_train.jsonl"],
            "eval": [f"{RECIPES}/easyllm_facts_heldout.jsonl"],
            "max_seq_len": 128,
        },
        "adapter": adapter,
        "quantize": quantize,
        "retention": [f"{RECIPES}/unrelated.jsonl"],
        "optimizer": {"kind": "adamw", "learning_rate": learning_rate},
        "schedule": {"kind": "cosine", "warmup_ratio": 0.1},
        "batch_size": batch,
        "max_steps": steps,
        "save_every": 0,
        "seed": seed,
    }
    out = work / "run"
    figures = run_training(TrainConfig.model_validate(config), out).figures
    shutil.rmtree(out)
    found = round(figures["eval_loss_nats"], 5), round(figures["retention_loss_nats"], 5)
    print(adapter, learning_rate, seed, *found, file=sys.stderr, flush=True)
    return found


def pretrained(work: Path, width: int) -> str:
    """Pretrains a model of four layers on Python's library; returns its folder."""
    out = work / "pretrained"
    changes = {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
    }
    sizes = (f"stages.pretrain.model.changes.{key}={value}" for key, value in changes.items())
    limits = ("stages.pretrain.max_tokens=100000", "stages.chat.max_steps=1")
    machine.easyllm("run", "from-scratch", f"output={out}", *sizes, *limits)
    return str(out / "pretrain" / "model")


def paged(_options: argparse.Namespace) -> Any:
    """Yields one row: peak memory of full fine-tuning with and without `optimizer.paged`."""
    found = {}
    for name, words in (("plain", ()), ("paged", ("optimizer.paged=true",))):
        with tempfile.TemporaryDirectory() as folder:
            figures, lines = train(
                Path(folder) / "run",
                *(f"data.train=[{RECIPES}/easyllm_facts_train.jsonl]", "data.max_seq_len=128"),
                *("adapter=null", "precision=fp32", "batch_size=4", "max_steps=6", "save_every=0"),
                *("micro_batch_tokens=512", "optimizer.learning_rate=1e-4", *words),
            )
            steps = [line for line in lines if "speed/tokens_per_s" in line]
            found[name] = {
                "peak_rss_gb": round(figures["peak_rss_bytes"] / 1e9, 3),
                "tokens_per_s": rate(steps),
                "last_loss_nats": steps[-1]["train/loss_nats"],
            }
    yield machine.row("peft-paged", **found)


if __name__ == "__main__":
    main()
