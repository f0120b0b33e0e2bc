"""Predicted against measured peak memory of 16 training and 8 serving runs, each in a process.

python bench/planner.py                 all runs, a JSON row each
python bench/planner.py --only lora     those whose name contains the word
python bench/planner.py --time          predicted and measured time of six runs, once calibrated
python bench/planner.py --table         the table of docs/planner-accuracy.md, from recorded rows

Next to the plan stands the rule of `accelerate estimate-memory`: the weights in their dtype, and
four times the weights for training with Adam. It names no process, so the process is left out of
its error, as of ours: `error` is of the whole process, `error_accelerate` of weights and states
against what was measured beyond the process.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine

RECIPES = Path(__file__).parents[1] / "recipes" / "data"
ROWS = 32
SFT = ("sft-lora", "data.max_seq_len=256", "batch_size=16")
DPO = ("dpo-en", "data.eval=[]", "eval_every=0", "batch_size=4", "data.max_seq_len=256")
PPO = ("ppo-max", "data.count=16", "data.held_out=2", "batch_size=8", "objective.critic.warm_up=0")
FULL, NF4 = "adapter=null", "quantize=nf4"
RECOMPUTE = "checkpoint_activations=full"
OWN_CRITIC = ("objective.critic.body=own", "objective.critic.trains_body=true")


def tokens(count: int) -> str:
    """Returns the override of the tokens of a packed forward pass."""
    return f"micro_batch_tokens={count}"


def fresh(depth: int) -> str:
    """Returns the override that trains a new model of a depth."""
    return f"model={{tokenizer: smollm2, depth: {depth}}}"


SMALL = "model=SMALL"
"""A model of depth 8 (75M parameters) with random weights, which is written once."""
TRAINING: dict[str, tuple[str, ...]] = {
    "full, SmolLM2": (*SFT, FULL, tokens(1024)),
    "full, SmolLM2, recomputed": (*SFT, FULL, tokens(1024), RECOMPUTE),
    "full, depth 4": (*SFT, FULL, tokens(1024), fresh(4)),
    "full, depth 6, accumulated": (*SFT, FULL, tokens(256), fresh(6)),
    "LoRA, SmolLM2": (*SFT, tokens(1024)),
    "LoRA, SmolLM2, recomputed": (*SFT, tokens(1024), RECOMPUTE),
    "LoRA, depth 8": (*SFT, SMALL, tokens(1024)),
    "LoRA, depth 8, accumulated": (*SFT, SMALL, tokens(256)),
    "QLoRA, SmolLM2": (*SFT, NF4, tokens(1024)),
    "QLoRA, depth 8, recomputed": (*SFT, NF4, SMALL, tokens(1024), RECOMPUTE),
    "QLoRA, depth 8, accumulated": (*SFT, NF4, SMALL, tokens(256)),
    "DPO, LoRA, SmolLM2": (*DPO, tokens(1024)),
    "DPO, LoRA, depth 8, recomputed": (*DPO, SMALL, tokens(1024), RECOMPUTE),
    "DPO, full, depth 8": (*DPO, SMALL, FULL, tokens(1024), "objective.reference=live"),
    "PPO, shared critic, SmolLM2": (*PPO, tokens(512)),
    "PPO, own critic, depth 8": (*PPO, SMALL, tokens(512), *OWN_CRITIC),
}
SERVING: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
    "nf4": {"quantize": "nf4"},
    "int8 cache, 16 sequences": {"dtype": "float32", "cache_dtype": "int8", "sequences": 16},
    "window of 64 tokens": {"dtype": "float32", "window": 64, "sequences": 16},
    "LoRA adapter": {"dtype": "float32", "adapter": True},
}
NEW_TOKENS, PROMPT_TOKENS = 32, 224
TIMED = (
    "full, depth 4",
    "LoRA, SmolLM2",
    "LoRA, SmolLM2, recomputed",
    "QLoRA, SmolLM2",
    "DPO, LoRA, SmolLM2",
    "PPO, shared critic, SmolLM2",
)
TIMED_STEPS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="runs whose name contains this")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    if options.serve is not None:
        print(json.dumps(serve(json.loads(options.serve))))
    elif options.table:
        print(table())
    elif options.time:
        for name in (name for name in TIMED if options.only.lower() in name.lower()):
            row = machine.row("planner_time", run=name, steps=TIMED_STEPS, **timed(name))
            machine.finish(row, "planner", record=options.record)
    else:
        runs = [(f"train: {name}", name) for name in TRAINING]
        runs += [(f"serve: {name}", name) for name in SERVING]
        for label, name in runs:
            if options.only.lower() in label.lower():
                found = trained(name) if label.startswith("train") else served(name)
                row = machine.row("planner", run=label, **found, **errors(found))
                machine.finish(row, "planner", record=options.record)


def errors(found: dict[str, Any]) -> dict[str, float]:
    """Returns the relative errors of the plan, and of accelerate's rule."""
    measured, own = found["measured_bytes"], found["process_bytes"]
    return {
        "error": round(found["predicted_bytes"] / measured - 1, 4),
        "error_accelerate": round(found["accelerate_bytes"] / (measured - own) - 1, 4),
    }


# ---- training


def recipe_of(name: str, folder: Path, rows: int) -> list[str]:
    """Returns a run's recipe and overrides, with files of so many rows in a folder."""
    recipe, *words = TRAINING[name]
    if recipe != "ppo-max":
        source = "pairs_en_train" if recipe == "dpo-en" else "easyllm_facts_train"
        lines = (RECIPES / f"{source}.jsonl").read_text().splitlines()[:rows]
        data = folder / "rows.jsonl"
        data.write_text("\n".join(lines) + "\n")
        words.append(f"data.train=[{data}]")
    if SMALL in words:
        words[words.index(SMALL)] = f"model={small_model(folder / 'small')}"
    return [recipe, *words]


def timed(name: str) -> dict[str, Any]:
    """Calibrates with two steps of a run, takes more, and returns what was planned and measured."""
    before = os.environ.get("XDG_CACHE_HOME")
    with tempfile.TemporaryDirectory() as folder:
        words = recipe_of(name, Path(folder), rows=10_000)
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
        try:
            machine.easyllm("plan", *words, "--calibrate", "--json")
            out = Path(folder) / "run"
            more = (f"max_steps={TIMED_STEPS}", "epochs=50", "eval_every=0", "save_every=0")
            machine.easyllm("train", *words, *more, f"output={out}", "--json")
        finally:
            os.environ.pop("XDG_CACHE_HOME")
            if before is not None:
                os.environ["XDG_CACHE_HOME"] = before
        found = json.loads((out / "manifest.json").read_text())["results"]
    planned, seconds = found["predicted_seconds"], found["seconds"]
    kept = {"utilisation": found["predicted_utilisation"], "error": round(planned / seconds - 1, 4)}
    return {"predicted_seconds": planned, "seconds": seconds} | kept


def trained(name: str) -> dict[str, Any]:
    """Runs two steps with `easyllm train`, and returns what its manifest says."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        recipe, *words = recipe_of(name, Path(folder), ROWS)
        machine.easyllm(
            "train", recipe, *words, "max_steps=2", "save_every=0", f"output={out}", "--json"
        )
        results = json.loads((out / "manifest.json").read_text())["results"]
    parts = results["predicted_bytes"]
    return {
        "predicted_bytes": results["predicted_peak_bytes"],
        "measured_bytes": results["peak_rss_bytes"],
        "process_bytes": parts["process"],
        "parts": parts,
        "measured_parts": results["measured_bytes"],
        "predicted_seconds": results["predicted_seconds"],
        "seconds": results["seconds"],
        "accelerate_bytes": 4 * weights_of(TRAINING[name]),
    }


def weights_of(words: Sequence[str]) -> int:
    """Returns the bytes of the model's fp32 weights, which accelerate's rule multiplies by four."""
    from easyllm.models.describe import describe
    from easyllm.plan import count_parameters

    depth = 8 if SMALL in words else next((n for n in range(1, 32) if fresh(n) in words), None)
    config = describe("smollm2") if depth is None else config_of(depth)
    return 4 * count_parameters(config).total


def config_of(depth: int) -> Any:
    """Returns the configuration of a new model of a depth, with SmolLM2's tokenizer."""
    from easyllm.models import load_tokenizer
    from easyllm.models.scratch import ScratchConfig, scratch_model_config

    asked = ScratchConfig(tokenizer="smollm2", depth=depth)
    return scratch_model_config(asked, load_tokenizer("smollm2"))


def small_model(folder: Path) -> Path:
    """Writes a model of depth 8 with random weights."""
    from easyllm.models import load_tokenizer, save_model

    save_model(fresh_model(config_of(8)), folder, tokenizer=load_tokenizer("smollm2"))
    return folder


# ---- serving


def served(name: str) -> dict[str, Any]:
    """Generates in a process of its own, and returns what it predicted and measured."""
    asked = json.dumps(SERVING[name])
    return machine.figures_of([sys.executable, __file__, "--serve", asked])


def serve(options: dict[str, Any]) -> dict[str, Any]:
    """Loads a model, answers some prompts at once, and compares its peak with the plan."""
    from easyllm.core.device import parse_dtype, peak_rss_bytes
    from easyllm.engine import LLM, SamplingParams
    from easyllm.engine.kv_cache import cache_format, cache_itemsize
    from easyllm.models import load_tokenizer
    from easyllm.models.describe import describe
    from easyllm.plan import count_parameters
    from easyllm.plan.inference import estimate_inference
    from easyllm.plan.process import process_bytes

    sequences, window = options.pop("sequences", 4), options.pop("window", None)
    adapter = options.pop("adapter", False)
    config = describe("smollm2") if window is None else windowed(window)
    tokenizer = load_tokenizer("smollm2")
    dtype = parse_dtype(options.get("dtype", "float32"))
    cache = cache_format(options.get("cache_dtype"), dtype)
    process = process_bytes()
    plan = estimate_inference(
        config,
        context=PROMPT_TOKENS + NEW_TOKENS,
        sequences=sequences,
        prompt=min(2048, sequences * PROMPT_TOKENS),
        itemsize=dtype.itemsize,
        scheme=options.get("quantize"),
        cache_itemsize=cache_itemsize(config, cache),
        device_type="cpu",
    )
    with tempfile.TemporaryDirectory() as folder:
        if adapter:
            options["adapters"] = {"lora": new_adapter(Path(folder))}
        if window is not None:
            options = {"model": fresh_model(config), "tokenizer": tokenizer}
        llm = LLM("smollm2", max_running=sequences, prefix_caching=False, **options)
        prompts = [
            [1 + (7 * i + j) % 40000 for j in range(PROMPT_TOKENS)] for i in range(sequences)
        ]
        llm.generate(prompts, SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True))
    bits = {"int8": 8, "int4": 4, "nf4": 4}.get(options.get("quantize", ""), 8 * dtype.itemsize)
    return {
        "predicted_bytes": process + plan.total,
        "measured_bytes": peak_rss_bytes(),
        "process_bytes": process,
        "parts": plan.as_dict(),
        "accelerate_bytes": count_parameters(config).total * bits // 8,
    }


def windowed(window: int) -> Any:
    """Returns SmolLM2's configuration with a sliding window in every layer."""
    from easyllm.models.describe import describe

    config = describe("smollm2")
    layers = []
    for layer in config.layers:
        mixer = layer.mixer.model_copy(update={"window": window})
        layers.append(layer.model_copy(update={"mixer": mixer}))
    return config.changed(layers=tuple(layers))


def fresh_model(config: Any) -> Any:
    """Returns a model of this configuration with random weights, in fp32."""
    import torch

    from easyllm.nn.decoder import Decoder

    model = Decoder(config)
    model.reset_parameters(generator=torch.Generator().manual_seed(0))
    return model.requires_grad_(False).eval()


def new_adapter(folder: Path) -> str:
    """Writes a LoRA adapter of SmolLM2 without training it, and returns its folder."""
    rows = folder / "rows.jsonl"
    text = (RECIPES / "easyllm_facts_train.jsonl").read_text().splitlines()
    rows.write_text("\n".join(text[:4]) + "\n")
    words = (f"data.train=[{rows}]", "max_steps=1", "save_every=0", f"output={folder / 'run'}")
    machine.easyllm("train", "sft-lora", "batch_size=1", *words, "--json")
    return str(folder / "run" / "adapter")


# ---- the table


def table() -> str:
    """Returns the newest row of each run as Markdown."""
    rows: dict[str, dict[str, Any]] = {}
    for line in (machine.HERE / "results" / "planner.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["bench"] == "planner":
            rows[row["run"]] = row
    lines = [
        "| run | process | plan | predicted | measured | error | accelerate's rule |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    names = [f"train: {name}" for name in TRAINING] + [f"serve: {name}" for name in SERVING]
    for name in (name for name in names if name in rows):
        row = rows[name]
        process, predicted = row["process_bytes"], row["predicted_bytes"]
        cells = [process, predicted - process, predicted, row["measured_bytes"]]
        shown = " | ".join(f"{cell / 1e6:,.0f}" for cell in cells)
        rule = f"{row['accelerate_bytes'] / 1e6:,.0f} ({row['error_accelerate']:+.0%})"
        lines.append(f"| {name} | {shown} | {row['error']:+.1%} | {rule} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
