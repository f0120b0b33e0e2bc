"""The `easyllm train` command."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from easyllm.cli.next_steps import after_training, print_steps
from easyllm.cli.output import JsonFlag, Overrides, figures_text, print_json, print_pairs

Processes = Annotated[
    int,
    typer.Option(
        "--nproc",
        min=1,
        help="Number of processes on this machine that share the run, as its key `parallel` says.",
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
    json_output: JsonFlag = False,
) -> None:
    r"""Train with a recipe; an interrupted run resumes.

    [bold]Examples[/bold]

        easyllm train sft-lora 'data.train=\[my-data.jsonl]' output=runs/mine

        easyllm train recipe.yaml optimizer.learning_rate=1e-4 --dry-run

        easyllm train recipe.yaml eval_every=50 --allow-change

        easyllm train recipe.yaml parallel.layout=zero2 --nproc 2

        torchrun --nproc-per-node 2 --nnodes 2 --rdzv-endpoint HOST:29500 -m easyllm train FILE
    """
    from easyllm.cli.ranks import run_ranks
    from easyllm.core.errors import ConfigError
    from easyllm.core.progress import is_first_rank
    from easyllm.core.yaml_text import dump_yaml
    from easyllm.pipeline.recipe import find_recipe, load_train_recipe, shipped_name
    from easyllm.reporting import reporting_callbacks
    from easyllm.rl.doctor import report
    from easyllm.train import dry_run as plan_training
    from easyllm.train import train as run_training

    path = find_recipe(recipe)
    config = load_train_recipe(path, overrides or [])
    if config.output is None:
        raise ConfigError(f"{path} sets no output folder; add output=runs/NAME")
    if nproc > 1 and not dry_run:
        run_ranks(nproc)
        return
    if dry_run:
        plan = plan_training(config, Path(config.output), allow_change=allow_change)
        if json_output:
            print_json({"recipe": config.model_dump(mode="json"), "plan": plan.as_dict()})
        else:
            sys.stdout.write(dump_yaml(config))
        return
    result = run_training(
        config,
        Path(config.output),
        callbacks=reporting_callbacks(config, shipped_name(path), diagnose=report),
        allow_change=allow_change,
    )
    if not is_first_rank():
        return
    if json_output:
        print_json(result.figures | {"output": str(result.output)})
        return
    figures = {name: value for name, value in result.figures.items() if name != "data"}
    print_pairs(figures_text(figures) | {"output": str(result.output)})
    print_steps(after_training(config, result.output))
