"""The `easyllm train` command."""

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from easyllm.cli.next_steps import after_training, print_steps
from easyllm.cli.output import JsonFlag, Overrides, figures_text, print_json, print_pairs

if TYPE_CHECKING:
    from easyllm.core.json_types import JsonObject
    from easyllm.train import Callback, TrainConfig

Processes = Annotated[
    int,
    typer.Option(
        "--nproc",
        min=1,
        help="Number of processes on this machine that share the run, as its key `parallel` says.",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--ray",
        min=1,
        help="Number of Ray Train workers that share the run, on the cluster of RAY_ADDRESS or "
        "on this machine.",
    ),
]
Restarts = Annotated[
    int,
    typer.Option(
        min=0,
        help="How often the processes are started again, from the newest checkpoint, when one has "
        "failed.",
    ),
]
AllowChange = Annotated[
    bool,
    typer.Option(
        "--allow-change",
        help="Resume with harmless changes: intervals of logging, saving, evaluation; device.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Validate, print the plan and the resolved recipe; train nothing.",
    ),
]


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    app.command("train")(train)


def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a built-in recipe.")],
    overrides: Overrides = None,
    dry_run: DryRun = False,
    allow_change: AllowChange = False,
    nproc: Processes = 1,
    ray: Workers = None,
    restarts: Restarts = 0,
    json_output: JsonFlag = False,
) -> None:
    r"""Train with a recipe; an interrupted run resumes.

    [bold]Examples[/bold]

        easyllm train sft-lora 'data.train=\[my-data.jsonl]' output=runs/mine

        easyllm train recipe.yaml optimizer.learning_rate=1e-4 --dry-run

        easyllm train recipe.yaml eval_every=50 --allow-change

        easyllm train recipe.yaml parallel.layout=zero2 --nproc 2 --restarts 3

        easyllm train recipe.yaml parallel.layout=fsdp --ray 8

        torchrun --nnodes 2 --node-rank 0 --master-addr HOST -m easyllm train FILE
    """
    from easyllm.cli.ranks import run_ranks, run_workers
    from easyllm.core.errors import ConfigError
    from easyllm.core.yaml_text import dump_yaml
    from easyllm.pipeline.recipe import find_recipe, load_train_recipe
    from easyllm.train import dry_run as plan_training
    from easyllm.train import train as run_training

    path = find_recipe(recipe)
    config = load_train_recipe(path, overrides or [])
    if config.output is None:
        raise ConfigError(f"{path} sets no output folder; add output=runs/NAME")
    if ray is not None and nproc > 1:
        raise ConfigError("--nproc starts processes here and --ray on a cluster; give one of them")
    if dry_run:
        plan = plan_training(config, Path(config.output), allow_change=allow_change)
        if json_output:
            print_json({"recipe": config.model_dump(mode="json"), "plan": plan.as_dict()})
        else:
            sys.stdout.write(dump_yaml(config))
    elif nproc > 1 or (restarts and ray is None):
        run_ranks(nproc, restarts=restarts)
    elif ray is not None:
        work = partial(_work, path, config, allow_change=allow_change)
        _show(config, run_workers(work, ray, config, restarts), json_output)
    else:
        callbacks = _callbacks(path, config)
        output = Path(config.output)
        result = run_training(config, output, callbacks=callbacks, allow_change=allow_change)
        _show(config, result.figures, json_output)


def _work(path: Path, config: "TrainConfig", *, allow_change: bool) -> None:
    """Trains as one of the ranks of a run."""
    from easyllm.train import train as run_training

    assert config.output is not None, "checked before"
    callbacks, output = _callbacks(path, config), Path(config.output)
    run_training(config, output, callbacks=callbacks, allow_change=allow_change)


def _callbacks(path: Path, config: "TrainConfig") -> "tuple[Callback, ...]":
    """Returns what reports on a run of a recipe."""
    from easyllm.pipeline.recipe import shipped_name
    from easyllm.reporting import reporting_callbacks
    from easyllm.rl.doctor import report

    return reporting_callbacks(config, shipped_name(path), diagnose=report)


def _show(config: "TrainConfig", figures: "JsonObject", json_output: bool) -> None:
    """Prints the figures of a run, on rank 0."""
    from easyllm.core.progress import is_first_rank

    if not is_first_rank():
        return
    output = str(config.output)
    if json_output:
        print_json(figures | {"output": output})
        return
    shown = {name: value for name, value in figures.items() if name != "data"}
    print_pairs(figures_text(shown) | {"output": output})
    print_steps(after_training(config, Path(output)))


__all__ = ["register", "train"]
