"""Results of evaluations: written to a folder, and compared item by item."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from easyllm.core.atomic import write_atomic, write_json
from easyllm.core.errors import ConfigError, DataError
from easyllm.core.json_types import JsonObject
from easyllm.core.jsonl import read_json_objects
from easyllm.evaluate.likelihood_metrics import likelihood_metrics
from easyllm.evaluate.metric import Metric, paired_difference, score, table
from easyllm.evaluate.task_run import SETTINGS, TaskRun
from easyllm.evaluate.text_metrics import bleu_details, text_metrics

RESULT, ITEMS = "result.json", "items.jsonl"
_CARRIED = ("model", "template_hash", "prompt_hash", "shots", "thinking")
"""Settings that are repeated in each score, so that a score alone says what it is of."""


def result_of(run: TaskRun, metrics: Sequence[Metric], *, language: str = "en") -> JsonObject:
    """Returns the result of a run as a JSON object: its settings and a list of `scores`."""
    scores = []
    for metric in metrics:
        statistics = table(metric, run.outcomes)
        found = asdict(score(metric, statistics))
        if metric.name == "bleu":
            found["details"] = bleu_details(statistics, "zh" if language == "zh" else "en")
        carried = {name: run.settings[name] for name in _CARRIED}
        found |= {"unparsed": run.unparsed, "truncated": run.truncated, **carried}
        scores.append(found)
    figures = {
        "n": len(run.items),
        "truncated": run.truncated,
        "unparsed": run.unparsed,
        "generated_tokens": run.tokens,
    }
    return {**run.settings, **figures, "language": language, "scores": scores}


def write_result(folder: Path, run: TaskRun, metrics: Sequence[Metric], result: JsonObject) -> None:
    """Writes a result, its settings, and the statistics of each item.

    Raises:
        OutputError: the folder cannot be written.
    """
    tables = {metric.name: table(metric, run.outcomes) for metric in metrics}
    lines = []
    for number, (item, outcome) in enumerate(zip(run.items, run.outcomes, strict=True)):
        row = {
            "id": item.id,
            "location": item.location,
            "answer": outcome.answer,
            "chosen": outcome.chosen,
            "references": outcome.references,
            "statistics": {name: values[number].tolist() for name, values in tables.items()},
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_atomic(folder / ITEMS, "".join(lines))
    write_json(folder / RESULT, result)


def write_settings(folder: Path, settings: JsonObject) -> None:
    """Writes what identifies a run, before its first response.

    Raises:
        OutputError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SETTINGS, settings)


def compare(first: Path, second: Path) -> JsonObject:
    """Compares two evaluations of the same items, item by item.

    Returns:
        `scores`: for each metric that both have, `difference` (second - first), its 95% interval
        and p-value (see `metric.paired_difference`).

    Raises:
        DataError: a folder is not that of a finished evaluation.
        ConfigError: the tasks or the items differ, or there is no common metric.
    """
    results = [_read(folder) for folder in (first, second)]
    (one, items_one), (two, items_two) = results
    if one["task"] != two["task"]:
        raise ConfigError(
            f"{str(first)!r} is of task {one['task']!r} and {str(second)!r} of {two['task']!r}; "
            "compare evaluations of the same task"
        )
    if set(items_one) != set(items_two):
        only = [len(set(a) - set(b)) for a, b in ((items_one, items_two), (items_two, items_one))]
        raise ConfigError(
            f"the evaluations have different items: {only[0]} only in {str(first)!r}, {only[1]} "
            f"only in {str(second)!r}, {len(set(items_one) & set(items_two))} in both; run both "
            "with the same data and --limit"
        )
    known = {**text_metrics(one["language"]), **likelihood_metrics()}
    shared = [s["name"] for s in one["scores"] if s["name"] in {t["name"] for t in two["scores"]}]
    if not shared:
        raise ConfigError("the evaluations have no common metric; run both with the same one")
    scores = [
        paired_difference(
            known[name],
            *(
                np.array([items[key]["statistics"][name] for key in items_one])
                for items in (items_one, items_two)
            ),
        )
        for name in shared
    ]
    settings = [{k: v for k, v in r.items() if k != "scores"} for r in (one, two)]
    return {"task": one["task"], "first": settings[0], "second": settings[1], "scores": scores}


def _read(folder: Path) -> tuple[JsonObject, dict[str, JsonObject]]:
    """Returns the result of an evaluation, and its items by id."""
    path = folder / RESULT
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        # equal rows are numbered, so that a data file may contain a row twice
        items, seen = {}, dict[str, int]()
        for row in read_json_objects(folder / ITEMS):
            seen[row["id"]] = seen.get(row["id"], 0) + 1
            items[f"{row['id']}/{seen[row['id']]}"] = row
        if not isinstance(result["scores"], list) or not items:
            raise KeyError("scores")
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"{str(folder)!r} is not the folder of a finished evaluation (it has no {RESULT} and "
            f"{ITEMS}); make one with easyllm eval MODEL --task NAME --data FILE --output FOLDER"
        ) from None
    return result, items


__all__ = ["compare", "result_of", "write_result", "write_settings"]
