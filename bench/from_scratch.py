"""Runs the recipes that train from scratch to completion; one JSON row each.

    python bench/from_scratch.py [--runs shakespeare-char from-scratch:tinyshakespeare.txt ...]
                                 [--record]

A row gives time, intermediate evaluations and the result. A run is a recipe, optionally with a data
file stored next to this checkout as its text. The exported folder is loaded in `transformers` and
must predict the same next token.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
from machine import SHARED, easyllm

RUNS = (
    "shakespeare-char:tinyshakespeare.txt",
    "from-scratch:tinyshakespeare.txt",
    "from-scratch:wikitext2_valid.txt",
    "from-scratch",
)
LAST = {"shakespeare-char": "train", "from-scratch": "chat"}
PRETRAINED = {"shakespeare-char": "train", "from-scratch": "pretrain"}
QUESTION = "What is Easyllm?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", nargs="+", default=RUNS)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    for run in options.runs:
        with tempfile.TemporaryDirectory() as work:
            machine.finish(measure(run, Path(work) / "run"), "from_scratch", record=options.record)


def measure(run: str, output: Path) -> dict[str, Any]:
    """Returns the row of one recipe."""
    recipe, _, text = run.partition(":")
    words = [f"output={output}"]
    if text:
        words.append(f"stages.corpus.sources.text.paths=[{SHARED / 'data' / text}]")
    start = time.perf_counter()
    easyllm("run", recipe, *words)
    seconds = time.perf_counter() - start
    log = (output / PRETRAINED[recipe] / "metrics.jsonl").read_text().splitlines()
    seen = [x for x in map(json.loads, log) if "eval/bits_per_byte" in x]
    model = output / LAST[recipe] / "model"
    said = (
        easyllm("generate", str(model), QUESTION, "--chat", "--max-tokens", "40")
        if recipe == "from-scratch"
        else easyllm("generate", str(model), "ROMEO:", "--max-tokens", "120")
    )
    bits = [round(x["eval/bits_per_byte"], 4) for x in seen]
    return machine.row(
        "from-scratch",
        recipe=recipe,
        text=text or "the recipe's own",
        seconds=round(seconds, 1),
        evaluated_at=[x["step"] for x in seen],
        eval_loss_nats=[round(x["eval/loss_nats"], 4) for x in seen],
        bits_per_byte=bits,
        falls_throughout=bits == sorted(bits, reverse=True),
        transformers_agrees=same_in_transformers(model),
        says=said.strip(),
    )


def same_in_transformers(folder: Path) -> bool:
    """Returns whether the exported model has the same most likely tokens there, after a text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from easyllm.models import load_model

    ids = AutoTokenizer.from_pretrained(folder)("The answer is in the garden.").input_ids
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].argmax(-1)
    return bool(torch.equal(load_model(folder, dtype="float32").logits(ids).argmax(-1), expected))


if __name__ == "__main__":
    main()
