"""The `easyllm data passkey` command."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from easyllm.cli.models import Model
from easyllm.cli.output import home_path


def passkey(
    model: Model,
    target: Annotated[Path, typer.Argument(callback=home_path, help="A new .jsonl file.")],
    lengths: Annotated[
        list[int],
        typer.Option("--length", min=64, help="Tokens of a context; several if repeated."),
    ],
    count: Annotated[
        int, typer.Option(min=1, help="Rows of each length, at evenly spread depths.")
    ] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the hidden numbers.")] = 0,
) -> None:
    """Write long texts with a hidden number, for easyllm eval --task passkey.

    Lengths are counted with the model's tokenizer.

    [bold]Examples[/bold]

        easyllm data passkey smollm2 passkey.jsonl --length 1024 --length 2048

        easyllm eval smollm2 --task passkey --data passkey.jsonl
    """
    import json

    from easyllm.core.atomic import check_output_free, write_atomic
    from easyllm.examples.passkey import passkey_rows
    from easyllm.models import load_tokenizer

    check_output_free(target)
    rows = list(passkey_rows(load_tokenizer(model), lengths, count=count, seed=seed))
    lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    write_atomic(target, lines.encode("utf-8"))
    sys.stdout.write(f"{len(rows)} rows in {target}\n")
