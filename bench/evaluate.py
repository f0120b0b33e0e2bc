"""lm-eval with our engine and with its own `hf` backend: seconds of the same tasks, in turn.

    python bench/evaluate.py --python PYTHON [--rounds 2] [--record]

PYTHON is the interpreter of an environment with lm-eval and transformers (`make interop
NAME=lm_eval` makes one). The tasks are made from a seed: four choices of at most 10 tokens after
contexts of at least 150, and texts to continue by 64 tokens. SmolLM2 in fp32, 2 threads; each
measurement is a process of its own, the model's loading is not counted, tokenizing is. The `hf`
backend runs at several batch sizes, of which the fastest counts. The log-probabilities of both must
be equal to 1e-4, or as close as the peer's at two batch sizes, and the texts the same.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

WORDS = [
    *("river", "stone", "market", "garden", "letter", "window", "engine", "summer", "teacher"),
    *("morning", "village", "doctor", "bridge", "winter", "music", "paper", "ocean", "forest"),
    *("table", "street", "answer", "question", "number", "castle", "painter", "farmer"),
]
HF_BATCHES = {"choices": (1, 4, 16), "texts": (8, 32)}
NEW_TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, required=True, help="Python with lm-eval")
    parser.add_argument("--docs", type=int, default=24, help="questions of the choices")
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--only", choices=list(HF_BATCHES), help="one of the tasks")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--item", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.item:
        print(json.dumps(measure(options.item, options.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tasks(folder, options)
        machine.easyllm("convert", "smollm2", str(folder / "model"))
        tasks = [options.only] if options.only else list(HF_BATCHES)
        results = {task: compare(task, folder, options) for task in tasks}
    shape = {"docs": options.docs, "choices": 4, "texts": options.texts, "new": NEW_TOKENS}
    machine.finish(
        machine.row("evaluate", shape=shape, results=results), "evaluate", record=options.record
    )


def compare(task: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measures a task with both, in turn, and compares what they computed."""
    items = ["easyllm:0", *(f"hf:{size}" for size in HF_BATCHES[task])]
    found: dict[str, list[dict[str, Any]]] = {}
    for number in range(options.rounds):
        for item in items:
            if number and item.startswith("hf") and item != _best(found):
                continue  # after the first round, only its fastest batch size
            command = [options.python, __file__, "--python", options.python]
            command += ["--item", f"{task}:{item}", "--folder", folder]
            found.setdefault(item, []).append(machine.figures_of(command))
    best = _best(found)
    ours = found["easyllm:0"][0]["answers"]
    gap = largest_gap(task, ours, found[best][0]["answers"])
    others = [rows[0]["answers"] for item, rows in found.items() if item.startswith("hf")]
    own = largest_gap(task, others[0], others[-1])
    if gap > max(1e-4, own):
        raise SystemExit(f"{task}: the answers differ by {gap}; the peer's batch sizes by {own}")
    seconds = {
        item: round(statistics.median(row["seconds"] for row in rows), 2)
        for item, rows in found.items()
    }
    ratio = round(seconds[best] / seconds["easyllm:0"], 2)
    return {
        "seconds": seconds,
        "best_peer": best,
        "times_as_fast": ratio,
        "largest_gap_nats" if task == "choices" else "different_texts": gap,
        "between_batch_sizes_of_peer": own,
    }


def largest_gap(task: str, first: list[Any], second: list[Any]) -> float:
    """Returns the largest difference of log-probabilities, or the number of different texts."""
    pairs = list(zip(first, second, strict=True))
    if task == "texts":
        return float(sum(a != b for a, b in pairs))
    return max(abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True))


def _best(found: dict[str, list[dict[str, Any]]]) -> str:
    """The fastest batch size of the peer."""
    peers = [item for item in found if item.startswith("hf")]
    return min(peers, key=lambda item: found[item][0]["seconds"])


def write_tasks(folder: Path, options: argparse.Namespace) -> None:
    """Writes both tasks, with their data, as files of lm-eval."""
    rng = random.Random(7)

    def text(count: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(count)).capitalize() + "."

    docs = [
        {
            "question": f"{text(170)}\nQuestion: Which words come next?\nAnswer:",
            "choices": [" ".join(rng.choice(WORDS) for _ in range(6)) for _ in range(4)],
            "answer": rng.randrange(4),
        }
        for _ in range(options.docs)
    ]
    texts = [{"question": text(60), "answer": "x"} for _ in range(options.texts)]
    common = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}"}
    choices = {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean"}],
    }
    generated = {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["<never>"], "max_gen_toks": NEW_TOKENS, "temperature": 0},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean"}],
    }
    for name, rows, task in (("choices", docs, choices), ("texts", texts, generated)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {"dataset_kwargs": {"data_files": {"test": str(path)}}}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **files, **task}))


def measure(item: str, folder: Path) -> dict[str, Any]:
    """Runs a task in this process; the time is that of the model's own methods."""
    import logging
    import os

    os.environ |= {"HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.disable(logging.WARNING)
    torch.set_num_threads(2)
    task, backend, size = item.split(":")
    model: Any
    if backend == "hf":
        model = HFLM(
            pretrained=str(folder / "model"), device="cpu", dtype="float32", batch_size=int(size)
        )
    else:
        from easyllm.engine import LLM
        from easyllm.evaluate.harness import harness_model

        model = harness_model(LLM(str(folder / "model")))
    spent = 0.0

    def timed(name: str) -> None:
        method = getattr(model, name)

        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            result = method(*arguments, **options)
            spent += time.perf_counter() - start
            return result

        setattr(model, name, run)

    for name in ("loglikelihood", "generate_until"):
        timed(name)
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=[task],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    assert found is not None
    samples = sorted(found["samples"][task], key=lambda each: each["doc_id"])
    answers = [each["filtered_resps"] for each in samples]
    if task == "choices":
        answers = [[float(pair[0]) for pair in each] for each in answers]
    return {"seconds": spent, "answers": answers}


if __name__ == "__main__":
    main()
