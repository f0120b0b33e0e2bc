"""The `easyllm verify` command."""

import math
from enum import StrEnum
from typing import Annotated, Any

import typer

from easyllm.cli.output import JsonFlag, print_json, print_table


class Against(StrEnum):
    """Available reference implementations."""

    transformers = "transformers"


class PlantedFault(StrEnum):
    """Faults of distributed training (`verify.planted`)."""

    mean = "mean"
    no_reduce = "no-reduce"
    local_adapter = "local-adapter"


Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL | [KEY=VALUE]...",
        help="A model (smollm2, a checkpoint folder, a .gguf file, or hf:org/name) or, with "
        "--parallel, overrides of the recipe.",
    ),
]
ParallelRecipe = Annotated[
    str | None,
    typer.Option(
        metavar="RECIPE",
        help="Compare a training recipe under DDP, ZeRO-1 to 3, FSDP and TP with one process.",
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(min=1, help="With --parallel: number of optimizer steps; by default 4."),
]
Layers = Annotated[
    int | None,
    typer.Option(min=0, help="With --parallel: first layers to keep (default 2); 0: all."),
]
Plant = Annotated[
    PlantedFault | None,
    typer.Option(help="With --parallel: plant this fault, to see that it is found."),
]


def register(app: typer.Typer) -> None:
    """Adds the `verify` command to `app`."""
    app.command("verify")(verify)


def verify(
    words: Words = None,
    against: Annotated[
        Against | None, typer.Option(help="Also compare with this library (extra `reference`).")
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Number of random tokens to compare on.")
    ] = 256,
    parallel: ParallelRecipe = None,
    steps: Steps = None,
    layers: Layers = None,
    plant: Plant = None,
    json_output: JsonFlag = False,
) -> None:
    r"""Check numerical equalities that must hold for a checkpoint or recipe; exit code 1 if not.

    [bold]Examples[/bold]

        easyllm verify smollm2

        easyllm verify runs/sft/model --against transformers --json

        easyllm verify --parallel sft-lora 'data.train=\[rows.jsonl]'
    """
    from easyllm.core.errors import ConfigError

    if parallel is not None:
        if against is not None:
            raise ConfigError("--against compares a model, not --parallel; give one of the two")
        fault = None if plant is None else plant.value
        sizes = {"steps": 4 if steps is None else steps, "layers": 2 if layers is None else layers}
        _verify_parallel(parallel, words or [], fault, json_output=json_output, **sizes)
        return
    for name, value in (("steps", steps), ("layers", layers), ("plant", plant)):
        if value is not None:
            raise ConfigError(f"--{name} applies to --parallel RECIPE; remove it, or give a recipe")
    if words is None or len(words) != 1:
        raise ConfigError(
            f"verify takes one model, but got {len(words or [])}; give a model such as smollm2, or "
            "--parallel RECIPE"
        )
    from easyllm.verify import verify as measure

    (model,) = words
    findings = measure(
        model, against="transformers" if against is not None else None, num_tokens=tokens
    )
    if json_output:
        print_json([finding.as_dict() for finding in findings])
    else:
        rows = [
            (f.law, f.claim, f"{f.figure:.2e}", f"{f.bound:.2e}", "yes" if f.holds else "NO")
            for f in findings
        ]
        print_table(f"Laws on {model}", ("law", "claim", "difference", "bound", "holds"), rows)
    if not all(finding.holds for finding in findings):
        raise typer.Exit(1)


def _verify_parallel(
    recipe: str,
    overrides: list[str],
    fault: str | None,
    *,
    steps: int,
    layers: int,
    json_output: bool,
) -> None:
    from easyllm.pipeline.recipe import find_recipe, load_train_recipe
    from easyllm.verify.parallel import verify_parallel

    config = load_train_recipe(find_recipe(recipe), overrides)
    chosen: Any = fault
    findings = verify_parallel(config, steps=steps, layers=layers, fault=chosen)
    if json_output:
        print_json([finding.as_dict() for finding in findings])
    else:
        columns = ("layout", "processes", "loss", "gradient norm", "gradient", "weight", "holds")
        holds = {True: "yes", False: "NO", None: "not run"}
        rows = [
            (
                f.layout,
                str(f.ranks or ""),
                *("" if math.isnan(n) else f"{n:.1e}" for n in (f.loss, f.norm)),
                *("" if math.isnan(n) else f"{n:.1e}" for n in (f.gradient, f.weight)),
                holds[f.holds] + (f": {f.note}" if f.note else ""),
            )
            for f in findings
        ]
        print_table(f"{recipe}: differences from one process", columns, rows)
    if any(finding.holds is False for finding in findings):
        raise typer.Exit(1)
