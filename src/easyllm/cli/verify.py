"""The `easyllm verify` command."""

from enum import StrEnum
from typing import Annotated

import typer

from easyllm.cli.models import Model
from easyllm.cli.output import JsonFlag, print_json, print_table


class Against(StrEnum):
    """Available reference implementations."""

    transformers = "transformers"


def register(app: typer.Typer) -> None:
    """Adds the `verify` command to `app`."""
    app.command("verify")(verify)


def verify(
    model: Model,
    against: Annotated[
        Against | None, typer.Option(help="Also compare with this library (extra `reference`).")
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Number of random tokens to compare on.")
    ] = 256,
    json_output: JsonFlag = False,
) -> None:
    """Check numerical equalities that must hold for a checkpoint; exit code 1 if one fails.

    [bold]Examples[/bold]

        easyllm verify smollm2

        easyllm verify runs/sft/model --against transformers --json
    """
    from easyllm.verify import verify as measure

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
