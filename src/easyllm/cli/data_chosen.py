"""The `easyllm data chosen` command."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from easyllm.cli.output import home_path


def chosen(
    file: Annotated[
        Path,
        typer.Argument(
            callback=home_path, help="A .json or .jsonl file of preference pairs or labelled rows."
        ),
    ],
    output: Annotated[
        Path, typer.Argument(callback=home_path, help="A new .jsonl file of conversations.")
    ],
) -> None:
    """Convert preference data to conversations: the chosen or good responses, to fine-tune on.

    Objectives that compare responses read the file as it is (docs/alignment.md).

    [bold]Examples[/bold]

        easyllm data chosen pairs.jsonl chosen.jsonl
    """
    from easyllm.core.atomic import output_errors, write_atomic
    from easyllm.core.errors import DataError, OutputError
    from easyllm.examples.chosen import chosen_rows
    from easyllm.examples.data_file import read_rows

    if output.suffix != ".jsonl":
        raise OutputError(f"{str(output)!r} does not end in .jsonl; name a .jsonl file")
    if output.exists():
        raise OutputError(f"{str(output)!r} already exists; name a new file")
    lines = [json.dumps(row, ensure_ascii=False) for row in chosen_rows(read_rows(file))]
    if not lines:
        raise DataError(f"no row of {str(file)!r} has a chosen or good response; check its labels")
    with output_errors(output):
        write_atomic(output, "".join(f"{line}\n" for line in lines))
    sys.stdout.write(f"{output}  {len(lines):,} conversations\n")
