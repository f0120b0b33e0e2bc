"""Running a recipe. A stage is keyed by a hash of its configuration and its inputs.

runs/NAME/recipe.yaml        the recipe, resolved
runs/NAME/STAGE/             the stage's files
runs/NAME/stages/STAGE.json  its key and figures, written when it is done
"""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyllm.core.atomic import write_json
from easyllm.core.config import Config
from easyllm.core.errors import DataError
from easyllm.core.manifest import hash_path, hash_value
from easyllm.core.progress import console, format_duration
from easyllm.core.run_folder import check_free, claim
from easyllm.models import locate
from easyllm.pipeline.recipe import EvaluateStage, Recipe, TrainStage, references
from easyllm.pipeline.stages import product, run_stage

PENDING = "pending.json"


@dataclass(frozen=True, slots=True)
class StageResult:
    """A finished stage: its folder, what others use of it, its figures, how long it took."""

    folder: Path
    product: Path
    figures: dict[str, Any]
    seconds: float
    skipped: bool


def run_recipe(recipe: Recipe) -> dict[str, StageResult]:
    """Runs the stages in order, skipping those that are done with the same configuration and inputs.

    Raises:
        OutputError: the output folder holds another recipe's run.
        SourceError, DataError: a model or data file is not there.
    """
    output = Path(recipe.output)
    check_free(output, recipe)
    keys: dict[str, str] = {}
    for name, stage in recipe.stages.items():
        keys[name] = _key(stage, keys)
    claim(output, recipe)  # only now: a mistake in the inputs leaves no folder behind
    results: dict[str, StageResult] = {}
    for number, (name, stage) in enumerate(recipe.stages.items(), 1):
        record = output / "stages" / f"{name}.json"
        label = f"[{number}/{len(recipe.stages)}] {name}"
        done = _read_record(record)
        folder = output / name
        use = product(stage, folder)
        if done is not None and done["key"] == keys[name] and (use.exists() or not folder.exists()):
            console().print(f"{label}: done before, skipped", markup=False)
            results[name] = StageResult(folder, use, done["figures"], done["seconds"], True)
            continue
        console().print(f"{label}: {stage.kind}", markup=False)
        _prepare(folder, record, keys[name], done)
        start = time.monotonic()
        resolved = _resolve(stage, {n: r.product for n, r in results.items()})
        figures = run_stage(resolved, folder)
        seconds = time.monotonic() - start
        write_json(record, {"key": keys[name], "figures": figures, "seconds": seconds})
        (output / "stages" / PENDING).unlink(missing_ok=True)
        console().print(f"{label}: finished in {format_duration(seconds)}", markup=False)
        results[name] = StageResult(folder, use, figures, seconds, False)
    return results


def _key(stage: Config, keys: dict[str, str]) -> str:
    """Hash of a stage's configuration, its input files and the keys of the stages it uses."""
    inputs = {name: keys[name] for name in references(stage)}
    for path in _input_paths(stage):
        if not path.exists():
            raise DataError(f"data file {str(path)!r} does not exist; name a .json or .jsonl file")
        inputs[str(path)] = hash_path(path)
    return hash_value({"config": stage.model_dump(mode="json"), "inputs": inputs})


def _input_paths(stage: Config) -> list[Path]:
    paths = []
    model = getattr(stage, "model", None)
    if isinstance(model, str) and not model.startswith("@"):
        paths.append(locate(model))
    if isinstance(stage, EvaluateStage):
        paths += [Path(p) for p in stage.data.values()]
    if isinstance(stage, TrainStage):
        paths += [Path(p) for p in (*stage.data.train, *stage.data.eval)]
    return paths


def _prepare(folder: Path, record: Path, key: str, done: dict[str, Any] | None) -> None:
    """Keeps a half-done folder of the same key (the stage goes on in it), removes one of another key."""
    pending = record.parent / PENDING
    same = _read_record(pending) == {"stage": record.stem, "key": key}
    if folder.exists() and not (same and done is None):
        shutil.rmtree(folder)
    record.unlink(missing_ok=True)
    write_json(pending, {"stage": record.stem, "key": key})


def _resolve(stage: Config, products: dict[str, Path]) -> Config:
    changes = {
        field: str(products[value[1:]])
        for field in ("model", "adapter")
        if isinstance(value := getattr(stage, field, None), str) and value.startswith("@")
    }
    return stage.model_copy(update=changes)


def _read_record(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None
