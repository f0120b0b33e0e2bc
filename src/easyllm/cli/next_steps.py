"""What to do after a training: the exact commands to chat with, merge, evaluate and serve it."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from easyllm.pipeline.recipe import Recipe
    from easyllm.pipeline.run import StageResult
    from easyllm.train import TrainConfig

Steps = dict[str, str]
"""A command or path for each thing to do."""


def after_training(config: "TrainConfig", output: Path) -> Steps:
    """Returns what can be done with the result of a training run.

    Args:
        config: the run's configuration.
        output: the run's folder.
    """
    from easyllm.reporting import REPORT_FILE
    from easyllm.train.data_config import DataConfig, RowsConfig
    from easyllm.train.objectives import objective_kind
    from easyllm.train.run import ADAPTER, MODEL

    result = output / (MODEL if config.adapter is None else ADAPTER)
    base = config.model if isinstance(config.model, str) else None
    steps: Steps = {}
    if objective_kind(config.objective).generates:
        steps |= _use(result, chat=config.data.has_chats, base=base)
        if isinstance(config.data, DataConfig):
            files = (*config.data.eval, *config.data.train)
            steps["evaluate"] = _command("eval", result, files[0])
    merges = config.adapter is not None and config.adapter.merge_unsupported_reason() is None
    if merges and base is not None:
        steps["merge"] = _command("merge", base, result, output / "merged")
    if isinstance(config.data, RowsConfig) and not steps:
        steps["result"] = str(result)
    return steps | {"report": f"open {output / REPORT_FILE}"}


def after_recipe(recipe: "Recipe", results: Mapping[str, "StageResult"]) -> Steps:
    """Returns what can be done with the last model that a recipe has produced.

    Args:
        recipe: the recipe.
        results: the results by stage name.
    """
    from easyllm.pipeline.recipe import ConvertStage, MergeStage, TrainStage
    from easyllm.pipeline.stages import train_config
    from easyllm.reporting import REPORT_FILE

    trained = [n for n, stage in recipe.stages.items() if isinstance(stage, TrainStage)]
    report = {"report": f"open {results[trained[-1]].folder / REPORT_FILE}"} if trained else {}
    for name, stage in reversed(recipe.stages.items()):
        if isinstance(stage, TrainStage):
            products = {n: result.product for n, result in results.items()}
            return after_training(_resolved(train_config(stage), products), results[name].folder)
        if isinstance(stage, MergeStage | ConvertStage):
            return _use(results[name].product, chat=True, base=_plain(stage.model)) | report
    return report


def print_steps(steps: Steps) -> None:
    """Prints the steps on standard output, each on its own line."""
    width = max(map(len, steps), default=0)
    lines = [f"  {name:<{width}}  {text}\n" for name, text in steps.items()]
    sys.stdout.write("".join(["\nnext:\n", *lines] if lines else []))


def _use(result: Path, *, chat: bool, base: str | None) -> Steps:
    """Returns the commands that generate with a model, or serve it next to its base."""
    name = "chat" if chat else "generate"
    first = _command("chat", result) if chat else _command("generate", result, "Once upon a time")
    served = [f"tuned={result}"] if base is None else [f"base={base}", f"tuned={result}"]
    return {name: first, "serve": _command("serve", *served)}


def _resolved(config: "TrainConfig", products: Mapping[str, Path]) -> "TrainConfig":
    """Returns a stage's configuration with references replaced by paths."""
    from easyllm.pipeline.recipe import resolve
    from easyllm.train import TrainConfig

    found = resolve(config, products)
    assert isinstance(found, TrainConfig), "resolving keeps the type"
    return found


def _plain(source: str) -> str | None:
    """Returns a model's source; None if it is the result of a stage."""
    from easyllm.pipeline.recipe import is_reference

    return None if is_reference(source) else source


def _command(verb: str, *words: object) -> str:
    return shlex.join(["easyllm", verb, *map(str, words)])
