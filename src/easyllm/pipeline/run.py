"""Runs a recipe. Each stage is keyed by a hash of its configuration and its inputs.

runs/NAME/recipe.yaml        the resolved recipe
runs/NAME/STAGE/             the stage's files
runs/NAME/stages/STAGE.json  its key and figures, written when it has finished
"""

import itertools
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from easyllm.core.atomic import write_json
from easyllm.core.config import Config
from easyllm.core.device import pick_device
from easyllm.core.errors import ConfigError, DataError
from easyllm.core.folder_lock import check_unlocked
from easyllm.core.json_types import JsonObject
from easyllm.core.manifest import hash_file, hash_path, hash_value
from easyllm.core.progress import console, format_duration
from easyllm.core.recipe_kind import command_of
from easyllm.core.run_folder import check_run_folder, claim_run_folder
from easyllm.core.yaml_text import read_yaml
from easyllm.corpus.shards import MANIFEST as SHARDS_MANIFEST
from easyllm.corpus.sources import SourceConfig, source_files
from easyllm.models import locate
from easyllm.models.scratch import ScratchConfig
from easyllm.pipeline.recipe import (
    ConvertStage,
    CorpusStage,
    EvaluateStage,
    ExtendStage,
    MergeStage,
    Recipe,
    Stage,
    TokenizerStage,
    TrainStage,
    check_stage_name,
    find_recipe,
    is_reference,
    load_recipe,
    load_train_recipe,
    references,
    resolve,
)
from easyllm.pipeline.stages import product, record_file, run_stage, train_config
from easyllm.tokenizer.folder import tokenizer_file
from easyllm.train import RunPlan, dry_run
from easyllm.train.config import Data
from easyllm.train.data_config import CorpusDataConfig

CHANGEABLE = ("seed", "stages")
"""Keys of a recipe that may change between runs: stages with other settings run again."""
PENDING = "pending.json"
READ_BYTES = 2**26
"""Maximum total size of a source's files for them to be hashed by content."""


@dataclass(frozen=True, slots=True)
class StageResult:
    """The result of a finished stage.

    Attributes:
        folder: the stage's folder.
        product: the file or folder that `@name` refers to.
        figures: the stage's results, as in its record.
        seconds: how long the stage took.
        skipped: whether it was up to date and did not run.
    """

    folder: Path
    product: Path
    figures: JsonObject
    seconds: float
    skipped: bool


def run_recipe(recipe: Recipe) -> dict[str, StageResult]:
    """Runs the stages in order, skipping those that are up to date.

    A stage is up to date if it has finished with the same configuration and inputs, and its result
    still exists.

    Returns:
        The results by stage name.

    Raises:
        OutputError: the output folder contains another recipe's run, or another process uses it.
        SourceError, DataError: a model or data file does not exist.
    """
    output = Path(recipe.output)
    keys = _keys(recipe)
    results: dict[str, StageResult] = {}
    # only now, so that an error in the inputs leaves no empty folder
    with claim_run_folder(output, recipe, ignore=CHANGEABLE):
        for number, (name, stage) in enumerate(recipe.stages.items(), 1):
            label = f"[{number}/{len(recipe.stages)}] {name}"
            products = {n: r.product for n, r in results.items()}
            results[name] = _result(
                stage, output / name, keys[name], products, label=label, recipe=recipe.name
            )
    return results


def _result(
    stage: Stage,
    folder: Path,
    key: str,
    products: Mapping[str, Path],
    *,
    label: str,
    recipe: str,
) -> StageResult:
    """Returns the result of a stage, which runs unless it is up to date.

    Args:
        products: the products of the stages before it, by name.
        label: what progress messages begin with.
        recipe: the recipe's name.
    """
    record, use = record_file(folder), product(stage, folder)
    done = _read_record(record)
    if done is not None and done["key"] == key and _exists(use):
        console().print(f"{label}: up to date, skipped", markup=False)
        return StageResult(folder, use, done["figures"], done["seconds"], True)
    console().print(f"{label}: {stage.kind}", markup=False)
    _prepare(stage, folder, key, done)
    start = time.monotonic()
    figures = run_stage(resolve(stage, products), folder, recipe)
    seconds = time.monotonic() - start
    write_json(record, {"key": key, "figures": figures, "seconds": seconds})
    _set_pending(folder, None)
    console().print(f"{label}: finished in {format_duration(seconds)}", markup=False)
    return StageResult(folder, use, figures, seconds, False)


@dataclass(frozen=True, slots=True)
class RecipePlan:
    """The plans of a recipe's trainings.

    Attributes:
        trainings: the plan of every training whose inputs exist, by stage name (`train` for a
            training recipe).
        waiting: the other trainings, each with the stages whose results it needs.
    """

    trainings: dict[str, RunPlan]
    waiting: dict[str, tuple[str, ...]]

    def waiting_lines(self) -> list[str]:
        """Returns a line of text for each training that cannot be planned yet."""
        return [
            f"{name}: planned when it starts, as it needs the results of {', '.join(needed)}"
            for name, needed in self.waiting.items()
        ]

    def as_dict(self) -> JsonObject:
        """Returns JSON-compatible values under `plans` and `waiting`."""
        plans = {name: plan.as_dict() for name, plan in self.trainings.items()}
        return {"plans": plans, "waiting": {n: list(needed) for n, needed in self.waiting.items()}}


def check_recipe(recipe: Recipe) -> RecipePlan:
    """Checks a recipe without running it, and plans its trainings.

    Raises:
        OutputError, SourceError, DataError, ConfigError: as for `run_recipe`, as far as errors can
            be detected before the first stage.
    """
    _keys(recipe)
    return _planned(recipe)


def plan_recipe(name: str, overrides: list[str]) -> RecipePlan:
    """Plans the trainings of a recipe; in a pipeline, those whose inputs already exist.

    Args:
        name: a recipe's file, or the name of a built-in recipe.
        overrides: changes to the recipe, as `key=value`.

    Raises:
        ConfigError: the recipe has no training; other errors as for `train.dry_run`.
    """
    path = find_recipe(name)
    command = command_of(read_yaml(path))
    if command == "data build":
        raise ConfigError(
            f"{path} builds a corpus and trains nothing; use: easyllm data build {name} --dry-run"
        )
    if command != "run":
        return RecipePlan({"train": dry_run(load_train_recipe(path, overrides), None)}, {})
    recipe = load_recipe(path, overrides)
    if not any(isinstance(stage, TrainStage) for stage in recipe.stages.values()):
        raise ConfigError(f"{path} contains no training; add a stage of kind train")
    return _planned(recipe)


def _planned(recipe: Recipe) -> RecipePlan:
    stages = {n: stage for n, stage in recipe.stages.items() if isinstance(stage, TrainStage)}
    waiting = {n: tuple(needed) for n, stage in stages.items() if (needed := references(stage))}
    ready = {n: stage for n, stage in stages.items() if n not in waiting}
    return RecipePlan(
        {n: dry_run(train_config(stage), None) for n, stage in ready.items()}, waiting
    )


def _keys(recipe: Recipe) -> dict[str, str]:
    """Returns the key of every stage; checks the output folder and that all inputs exist."""
    check_run_folder(Path(recipe.output), recipe, ignore=CHANGEABLE)
    keys: dict[str, str] = {}
    for name, stage in recipe.stages.items():
        if isinstance(stage, TrainStage):
            pick_device(stage.device)  # now, not when the stage starts
        keys[name] = _key(stage, keys)
    return keys


def _key(stage: Config, keys: dict[str, str]) -> str:
    """Returns a hash of a stage's configuration, its inputs and the keys of the stages it uses."""
    inputs = {name: keys[name] for name in references(stage)} | _inputs(stage)
    return hash_value({"config": stage.model_dump(mode="json"), "inputs": inputs})


def _inputs(stage: Config) -> dict[str, str]:
    """Returns hashes of a stage's inputs, other than the results of other stages.

    Raises:
        SourceError, DataError: an input does not exist.
    """
    match stage:
        case TokenizerStage():
            return _stamps(stage.sources)
        case ExtendStage():
            return _stamps(stage.sources) | _hashes(_model(stage.model))
        case CorpusStage():
            sets = stage.decontaminate.sets if stage.decontaminate else {}
            return _stamps(stage.sources) | _stamps(sets) | _hashes(_tokenizer(stage.tokenizer))
        case TrainStage():
            return _hashes(_base(stage.model), *_data_files(stage.data))
        case EvaluateStage():
            return _hashes(_model(stage.model), *stage.data.values())
        case MergeStage():
            return _hashes(_model(stage.model), stage.adapter)
        case ConvertStage():
            return _hashes(_model(stage.model))
    raise AssertionError(f"no rule for the inputs of a stage of type {type(stage).__name__}")


def _data_files(data: Data) -> list[str]:
    """Returns the data files; for token shards the manifest, which has the hashes of all shards."""
    if not isinstance(data, CorpusDataConfig):
        return [file for files in data.files for file in files]
    folders = [data.shards, *([data.validation] if data.validation else [])]
    return [f if is_reference(f) else str(Path(f) / SHARDS_MANIFEST) for f in folders]


def _base(model: str | ScratchConfig) -> str:
    return _tokenizer(model.tokenizer) if isinstance(model, ScratchConfig) else _model(model)


def _model(source: str) -> str:
    return source if is_reference(source) else str(locate(source))


def _tokenizer(source: str) -> str:
    """Returns the tokenizer file of a folder, since weights next to it do not matter."""
    alone = tokenizer_file(Path(source))
    return str(alone) if alone is not None else _model(source)


def _hashes(*paths: str) -> dict[str, str]:
    """Returns hashes of the contents of paths, without references."""
    found = {}
    for path in paths:
        if is_reference(path):
            continue
        if not Path(path).exists():
            raise DataError(f"data file {path!r} does not exist; check the path in the recipe")
        found[path] = hash_path(Path(path))
    return found


def _stamps(sources: Mapping[str, SourceConfig]) -> dict[str, str]:
    """Returns a hash of each source's files.

    The hash covers the files' contents, or their sizes and modification times if a source is too
    large to read for this purpose.
    """
    found = {}
    for name, source in sources.items():
        files = [Path(file.path) for file in source_files(source)]
        stats = [(file, file.stat()) for file in files]
        small = sum(s.st_size for _, s in stats) <= READ_BYTES
        found[name] = hash_value(
            [[str(f), hash_file(f) if small else [s.st_size, s.st_mtime_ns]] for f, s in stats]
        )
    return found


def _prepare(stage: Config, folder: Path, key: str, done: JsonObject | None) -> None:
    """Prepares the folder of a stage that is about to run.

    A partial result with the same key is kept, so that the stage resumes. One with another key is
    removed, except for a training, which is renamed.

    Raises:
        OutputError: another process uses the folder.
    """
    resumes = done is None and _read_pending(folder).get(folder.name) == key
    if os.path.lexists(folder) and not resumes:
        check_stage_name(folder.name)  # nothing outside the run's folder is ever removed
        check_unlocked(folder)
        if isinstance(stage, TrainStage):
            aside = _free_name(folder)
            folder.rename(aside)
            console().print(
                f"the previous training is now in {aside}", markup=False, soft_wrap=True
            )
        elif folder.is_symlink() or not folder.is_dir():
            folder.unlink()
        else:
            shutil.rmtree(folder)
    record_file(folder).unlink(missing_ok=True)
    _set_pending(folder, key)


def _exists(path: Path) -> bool:
    """Returns whether a file, or a folder that is not empty, exists."""
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def _free_name(folder: Path) -> Path:
    """Returns NAME.1, or the same with the first unused number."""
    names = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def _read_record(path: Path) -> JsonObject | None:
    """Returns the record of a finished stage; None if there is none that can be read."""
    record = _read_object(path)
    return record if {"key", "figures", "seconds"} <= record.keys() else None


def _read_pending(folder: Path) -> JsonObject:
    """Returns the keys of the stages that have started but not finished, by name."""
    found = _read_object(record_file(folder).with_name(PENDING))
    if found.keys() == {"stage", "key"}:  # written by an older version
        return {str(found["stage"]): found["key"]}
    stages = found.get("stages")
    return stages if isinstance(stages, dict) else {}


def _set_pending(folder: Path, key: str | None) -> None:
    """Notes that a stage has started with a key or, without one, that it has finished."""
    stages = {n: k for n, k in _read_pending(folder).items() if n != folder.name}
    stages |= {} if key is None else {folder.name: key}
    path = record_file(folder).with_name(PENDING)
    if stages:
        write_json(path, {"stages": stages})
    else:
        path.unlink(missing_ok=True)


def _read_object(path: Path) -> JsonObject:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
