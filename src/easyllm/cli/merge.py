"""The `easyllm merge` command."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from easyllm.cli.models import Model, Target
from easyllm.cli.output import JsonFlag, home_path, print_json, print_table

if TYPE_CHECKING:
    from easyllm.verify.export_gate import Gate, Row


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    app.command("merge")(merge)


def merge(
    base: Model,
    adapter: Annotated[Path, typer.Argument(callback=home_path, help="Folder of an adapter.")],
    target: Target,
    dtype: Annotated[
        str, typer.Option(help="Dtype of the saved weights: float32, bfloat16 or float16.")
    ] = "float32",
    text: Annotated[
        Path | None,
        typer.Option(
            callback=home_path,
            help="A text file to compare on; by default a built-in text.",
            metavar="FILE",
        ),
    ] = None,
    max_drift: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Largest max |Δlogits|, as a fraction of the logits' range; by default that of "
            "the dtype (0.0001 for float32).",
        ),
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep a result that differs by more than that.")
    ] = False,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Do not compare the result with the adapter.")
    ] = False,
    json_output: JsonFlag = False,
) -> None:
    """Merge an adapter into its base model, and compare the result with the adapter.

    A table shows how far the merged model is from the attached adapter: in memory, saved and
    reloaded, and served. If one differs by more than the bound, nothing is written and the exit
    code is 1.

    [bold]Examples[/bold]

        easyllm merge smollm2 runs/sft-lora/adapter out/tuned

        easyllm merge smollm2 runs/sft-lora/adapter out/tuned --dtype bfloat16 --text held_out.txt
    """
    from easyllm.core.atomic import check_output_free
    from easyllm.core.errors import ConfigError
    from easyllm.pipeline.merge import merge_adapter
    from easyllm.verify.export_gate import GateError

    given = {"--text": text, "--max-drift": max_drift, "--keep": keep or None}
    if no_check and (unused := [name for name, value in given.items() if value is not None]):
        raise ConfigError(f"{unused[0]} concerns the comparison, which --no-check leaves out")
    check_output_free(target)
    try:
        merged = merge_adapter(
            base,
            adapter,
            target,
            dtype=dtype,
            check=not no_check,
            text=text,
            max_drift=max_drift,
            keep=keep,
        )
    except GateError as error:
        _print(error.gate, None, json_output=json_output)
        raise
    _print(merged.gate, merged.folder, json_output=json_output)
    if merged.gate is not None and not merged.gate.passed:
        raise GateError(f"{merged.gate.complaint}; {str(target)!r} was kept", merged.gate)


def _print(gate: "Gate | None", folder: Path | None, *, json_output: bool) -> None:
    """Prints the comparison and the folder, which is None if nothing was written."""
    if json_output:
        figures = {} if gate is None else gate.as_dict()
        print_json({"folder": None if folder is None else str(folder), **figures})
        return
    if gate is not None:
        title = f"Difference from {gate.reference} on {gate.text.num_tokens} tokens"
        columns = ("", "drift", "bound", "holds", "KL (nats)", "same top-1")
        print_table(title, columns, [gate_cells(row) for row in gate.rows])
        sys.stdout.write("drift: max |Δlogits| / range of the logits\n")
        sys.stdout.write(f"text: {gate.text.source}\n")
        for note in gate.notes:
            sys.stdout.write(f"{note}\n")
    if folder is not None:
        sys.stdout.write(f"{folder}\n")


def gate_cells(row: "Row") -> tuple[str, ...]:
    """Returns the cells of a variant's row in a table of the gate."""
    if row.skipped:
        return (row.name, *["-"] * 5)
    bound = ("", "") if row.bound is None else (f"{row.bound:.1e}", "yes" if row.holds else "NO")
    return (row.name, f"{row.drift:.1e}", *bound, f"{row.kl_nats:.1e}", f"{row.agreement:.1%}")
