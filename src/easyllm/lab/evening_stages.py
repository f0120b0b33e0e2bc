"""The stages of an evening: those of the recipe, then quantization and a served question.

Each is resumable: the recipe's stages are (`pipeline/run`), and the others leave a record in
`records/`, without which they run again.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

from easyllm.core.atomic import write_json
from easyllm.core.errors import EasyllmError
from easyllm.core.json_types import JsonObject
from easyllm.core.progress import console, format_duration
from easyllm.engine import LLM
from easyllm.lab.evening_plan import EveningPlan
from easyllm.pipeline.quantize import quantize
from easyllm.pipeline.quantize_options import QuantizeOptions
from easyllm.pipeline.quantize_price import Price
from easyllm.pipeline.recipe import find_recipe, load_recipe
from easyllm.pipeline.run import StageResult, run_recipe
from easyllm.serve.run import bind, build_server
from easyllm.train.metrics import read_metrics

RECIPE = "evening"
STAGES, RECORDS = "stages", "records"
GPTQ, GGUF = "model-gptq", "model.gguf"
START_S = 60.0
"""Time in which the server has to start."""
QUESTIONS = {"en": "What is the default model of Easyllm?", "zh": "请问，掩耳盗铃是什么意思？"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evening:
    """What the stages of an evening left.

    Attributes:
        results: the recipe's stages by name.
        records: figures of the stages after them (`gptq`, `gguf`, `serve`), each with `seconds`.
        metrics: the lines of `metrics.jsonl` of each training.
    """

    results: dict[str, StageResult]
    records: dict[str, JsonObject]
    metrics: dict[str, list[JsonObject]]

    def seconds(self) -> dict[str, float]:
        """Returns how long each stage took."""
        found = {name: result.seconds for name, result in self.results.items()}
        return found | {name: float(r["seconds"]) for name, r in self.records.items()}


def run_stages(plan: EveningPlan, folder: Path, *, samples: int) -> Evening:
    """Runs the stages that have not finished.

    Args:
        plan: the sizes.
        folder: the evening's folder.
        samples: calibration sequences of GPTQ.
    """
    overrides = [f"output={folder / STAGES}", *plan.overrides]
    results = run_recipe(load_recipe(find_recipe(RECIPE), overrides))
    tuned = str(results["grpo"].product)

    def gptq() -> JsonObject:
        options = QuantizeOptions(method="gptq", bits=4, group_size=64, samples=samples, length=128)
        return _figures(quantize(tuned, folder / GPTQ, options, keep=True))

    def gguf() -> JsonObject:
        options = QuantizeOptions(type="q8_0")
        return _figures(quantize(tuned, folder / GGUF, options, keep=True))

    steps: dict[str, Callable[[], JsonObject]] = {
        "gptq": gptq,
        "gguf": gguf,
        "serve": lambda: ask_served(folder / GGUF, QUESTIONS[plan.language]),
    }
    records = {name: _recorded(folder / RECORDS, name, step) for name, step in steps.items()}
    trained = ("pretrain", "sft", "dpo", "grpo")
    return Evening(
        results=results,
        records=records,
        metrics={name: read_metrics(results[name].folder) for name in trained},
    )


def _figures(price: Price) -> JsonObject:
    return {
        "bytes": price.num_bytes,
        "bits_per_weight": price.bits_per_weight,
        "perplexity": price.perplexity,
        "original_perplexity": price.original_perplexity,
    }


def _recorded(folder: Path, name: str, step: Callable[[], JsonObject]) -> JsonObject:
    """Returns a stage's record, after running it if there is none."""
    path = folder / f"{name}.json"
    if path.is_file():
        console().print(f"{name}: up to date, skipped", markup=False)
        found: JsonObject = json.loads(path.read_text(encoding="utf-8"))
        return found
    console().print(f"{name}: started", markup=False)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in {"gptq": [GPTQ], "gguf": [GGUF]}.get(name, []):
        _remove(folder.parent / leftover)
    started = time.monotonic()
    record = step()
    record["seconds"] = time.monotonic() - started
    write_json(path, record)
    console().print(f"{name}: finished in {format_duration(record['seconds'])}", markup=False)
    return record


def _remove(path: Path) -> None:
    """Removes what a stage wrote whose record was not written any more."""
    if path.is_dir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def ask_served(model: Path, question: str) -> JsonObject:
    """Serves a model on a free port, loads the page, asks a question, and stops the server.

    Raises:
        EasyllmError: the server does not start.
    """
    with _running(model) as address:
        with urlopen(address, timeout=START_S) as answer:
            page = answer.read().decode()
        body = {
            "model": "evening",
            "messages": [{"role": "user", "content": question}],
            "max_tokens": 48,
            "temperature": 0,
        }
        request = Request(
            f"{address}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        started = time.monotonic()
        with urlopen(request, timeout=10 * START_S) as answer:
            found = json.load(answer)
        seconds = time.monotonic() - started
    tokens = found["usage"]["completion_tokens"]
    return {
        "question": question,
        "answer": found["choices"][0]["message"]["content"],
        "tokens_per_s": tokens / seconds,
        "page_bytes": len(page),
    }


@contextmanager
def _running(model: Path) -> Iterator[str]:
    listener = bind("127.0.0.1", 0)
    server = build_server({"evening": LLM(str(model))})
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + START_S
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.02)
    try:
        if not server.started:
            raise EasyllmError(f"the server of {model} did not start within {START_S:.0f} s")
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=START_S)


__all__ = ["GGUF", "GPTQ", "Evening", "ask_served", "run_stages"]
