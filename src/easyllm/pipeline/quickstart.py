"""The quickstart: runs its recipe and summarises the results."""

from dataclasses import dataclass
from pathlib import Path

from easyllm.core.atomic import write_json
from easyllm.core.json_types import JsonObject
from easyllm.pipeline.recipe import Recipe, find_recipe, load_recipe
from easyllm.pipeline.run import StageResult, run_recipe
from easyllm.train.metrics import read_metrics

RECIPE_NAME = "quickstart"
SUMMARY_FILE = "summary.json"
SHOWN_ANSWERS = 3


@dataclass(frozen=True, slots=True)
class Quickstart:
    """The results of the quickstart.

    Attributes:
        output: the run's folder.
        tuned: folder of the fine-tuned model.
        recipe: the recipe that ran.
        results: the results by stage name.
        summary: the contents of `summary.json`.
    """

    output: Path
    tuned: Path
    recipe: Recipe
    results: dict[str, StageResult]
    summary: JsonObject


def run_quickstart(overrides: list[str]) -> Quickstart:
    """Runs the quickstart recipe and writes `summary.json`.

    Args:
        overrides: changes to the recipe, as `key=value`.
    """
    recipe = load_recipe(find_recipe(RECIPE_NAME), overrides)
    results = run_recipe(recipe)
    summary = summarise(recipe, results)
    write_json(Path(recipe.output) / SUMMARY_FILE, summary)
    return Quickstart(
        output=Path(recipe.output),
        tuned=results["merged"].product,
        recipe=recipe,
        results=results,
        summary=summary,
    )


def summarise(recipe: Recipe, results: dict[str, StageResult]) -> JsonObject:
    """Returns the summary of a run: losses and recall before and after, speed, answers, paths."""
    before, after = results["before"].figures, results["after"].figures
    tune = results["tune"]
    seconds = sum(result.seconds for result in results.values())
    return {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "heldout_loss_nats": _pair(before["heldout"], after["heldout"], "loss_nats"),
        "unrelated_loss_nats": _pair(before["unrelated"], after["unrelated"], "loss_nats"),
        "recall": {"before": before["heldout"]["recall"], "after": after["heldout"]["recall"]},
        "train_tokens_per_s": training_speed(tune.folder),
        "train_steps": tune.figures["steps"],
        "peak_rss_gb": round(tune.figures["peak_rss_bytes"] / 1e9, 2),
        "seconds": {name: round(result.seconds, 1) for name, result in results.items()},
        "total_seconds": round(seconds, 1),
        "answers": _answers(before["heldout"]["answers"], after["heldout"]["answers"]),
        "paths": {
            "run": str(Path(recipe.output)),
            "adapter": str(tune.product),
            "model": str(results["merged"].product),
            "metrics": str(tune.folder / "metrics.jsonl"),
        },
    }


def training_speed(run: Path) -> float:
    """Returns the tokens per second over all steps in a run's `metrics.jsonl`."""
    steps = [line for line in read_metrics(run) if "speed/tokens_per_s" in line]
    tokens = sum(line["train/tokens"] for line in steps)
    seconds = sum(line["train/tokens"] / line["speed/tokens_per_s"] for line in steps)
    return round(tokens / seconds, 1) if seconds else 0.0


def _pair(before: JsonObject, after: JsonObject, key: str) -> dict[str, float]:
    a, b = before[key], after[key]
    return {
        "before": round(a, 4),
        "after": round(b, 4),
        "change_percent": round(100 * (b / a - 1), 1),
    }


def _answers(before: list[JsonObject], after: list[JsonObject]) -> list[dict[str, str]]:
    """Returns a few questions with both models' answers.

    Questions that only the tuned model answers correctly come first.
    """
    pairs = list(zip(before, after, strict=True))
    pairs.sort(key=lambda pair: (not pair[1]["correct"], pair[0]["correct"]))
    step = max(1, sum(b["correct"] for _, b in pairs) // SHOWN_ANSWERS)
    return [
        {"question": a["question"], "before": a["answer"], "after": b["answer"]}
        for a, b in pairs[: step * SHOWN_ANSWERS : step]
    ]
