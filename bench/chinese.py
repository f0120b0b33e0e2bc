"""The recipes `continue-zh` and `sft-zh` from start to end, as one JSON row.

    python bench/chinese.py [--work FOLDER] [--note TEXT] [--record]

Runs the commands of docs/continue-zh.md and docs/sft-zh.md in the folder, where finished steps are
not repeated, and evaluates the models before and after. Bits per byte are those of the held-out
documents, in each model's own tokens; recall is the share of the held-out questions whose answer
contains the key.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import machine

from easyllm.core.run_folder import recipes_folder
from easyllm.corpus.shards import TokenShards
from easyllm.engine import LLM, SamplingParams
from easyllm.evaluate import evaluate_answers
from easyllm.evaluate.perplexity import perplexity
from easyllm.models import load_model, load_tokenizer
from easyllm.pipeline import find_recipe, load_recipe
from easyllm.train.metrics import read_metrics

DATA = recipes_folder() / "data"
PROMPTS = ("法国的首都是", "清明是二十四节气之一，", "孔子是")
QUESTIONS = ("法国的首都在哪儿？", "清明是什么时候？", "请问，大熊猫爱吃什么？")


def main() -> None:
    """Runs the recipes, and prints or records the row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--note", help="Conditions of the measurement, for the row.")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        figures: dict[str, Any] = {"continue_zh": continued(work), "sft_zh": fine_tuned(work)}
    if options.note:
        figures["note"] = options.note
    machine.finish(machine.row("chinese", **figures), "chinese", record=options.record)


def continued(work: Path) -> dict[str, Any]:
    """Returns the figures of `continue-zh`."""
    run = work / "continue-zh"
    machine.easyllm("run", "continue-zh", f"output={run}")
    base, model = run / "extend", run / "train" / "model"
    texts = held_out(run / "corpus" / "shards" / "validation", str(base))
    bits = {
        "smollm2": bits_per_byte("smollm2", texts),
        "extended": bits_per_byte(str(base), texts),
        "continued": bits_per_byte(str(model), texts),
    }
    llm = LLM(model)
    written = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=24))
    return {
        "new_pieces": load_recipe(find_recipe("continue-zh"), []).stages["extend"].new,
        **cost(run / "train"),
        "held_out_documents": len(texts),
        "bits_per_byte": bits,
        "text": {p: done.text for p, done in zip(PROMPTS, written, strict=True)},
    }


def fine_tuned(work: Path) -> dict[str, Any]:
    """Returns the figures of `sft-zh` on the result of `continue-zh`."""
    base, run = work / "continue-zh" / "train" / "model", work / "sft-zh"
    if not (run / "manifest.json").exists():
        machine.easyllm("train", "sft-zh", f"model={base}", f"output={run}")
    before, after = LLM(base), LLM(run / "adapter")
    heldout = DATA / "zh_heldout.jsonl"
    reports = {n: evaluate_answers(x, heldout) for n, x in (("before", before), ("after", after))}
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    said = after.chat(chats, SamplingParams(temperature=0, max_tokens=32))
    return {
        **cost(run),
        "questions": reports["after"].num_rows,
        "recall": {name: round(r.recall or 0, 4) for name, r in reports.items()},
        "held_out_loss_nats": {name: round(r.loss_nats, 4) for name, r in reports.items()},
        "answers": {q: done.text for q, done in zip(QUESTIONS, said, strict=True)},
    }


def cost(run: Path) -> dict[str, Any]:
    """Returns the steps, tokens, time and memory of a training run."""
    figures = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["results"]
    steps = [line for line in read_metrics(run) if "speed/tokens_per_s" in line]
    seconds = sum(line["train/tokens"] / line["speed/tokens_per_s"] for line in steps)
    return {
        "steps": figures["steps"],
        "tokens": figures["tokens"],
        "training_seconds": round(seconds, 1),
        "peak_rss_gb": round(figures["peak_rss_bytes"] / 1e9, 2),
    }


def held_out(shards: Path, tokenizer: str) -> list[str]:
    """Returns the held-out documents of a corpus as text."""
    decode, corpus = load_tokenizer(tokenizer).decode, TokenShards(shards)
    return [decode(corpus.document(i).tolist()) for i in range(len(corpus))]


def bits_per_byte(source: str, texts: list[str]) -> float:
    """Returns the bits per byte of texts under a model, in the model's own tokens."""
    model = load_model(source, dtype="float32")
    return round(perplexity(model, load_tokenizer(source), texts).bits_per_byte or 0.0, 4)


if __name__ == "__main__":
    main()
