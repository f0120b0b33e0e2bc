"""The `easyllm quantize` command."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from easyllm.cli.models import Model
from easyllm.cli.options import FlagGroup, Values, with_flags
from easyllm.cli.output import JsonFlag, home_path, print_json, print_table
from easyllm.pipeline.quantize_options import QuantizeOptions

if TYPE_CHECKING:
    from easyllm.pipeline.quantize import Price

OPTIONS = FlagGroup(
    QuantizeOptions,
    *("method", "format", "type", "bits", "group_size", "asymmetric", "dtype", "act_order"),
    *("data", "samples", "length", "importance", "text"),
    metavars={
        "method": "rtn|gptq|awq",
        "format": "gptq|awq|compressed-tensors|gguf",
        "type": "q8_0|q6_k|q5_k|q4_k|q5_1|q5_0|q4_1|q4_0",
        "bits": "2|3|4|8",
        "dtype": "float16|bfloat16|float32",
        "data": "FILE",
        "text": "FILE",
    },
)


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    app.command("quantize")(quantize)


@with_flags
def quantize(
    model: Model,
    target: Annotated[
        Path,
        typer.Argument(
            callback=home_path, help="Folder to write; for GGUF, a file.", metavar="OUT"
        ),
    ],
    options: Annotated[Values, OPTIONS],
    json_output: JsonFlag = False,
) -> None:
    """Quantize a model to a file that other programs read, and measure what it costs.

    [bold]Examples[/bold]

        easyllm quantize smollm2 out/gptq --method gptq --bits 4 --group-size 64

        easyllm quantize runs/mine/model out/awq --method awq --asymmetric --data my-data.jsonl

        easyllm quantize smollm2 out/smollm2-q4_0.gguf --type q4_0
    """
    from easyllm.core.config import validate
    from easyllm.pipeline.quantize import quantize as run

    price = run(model, target, validate(QuantizeOptions, options, source="quantize options"))
    if json_output:
        print_json(price.as_dict())
    else:
        _print(price)


def _print(price: "Price") -> None:
    row = price.row
    rows = [
        ("bits per weight", f"{price.bits_per_weight:.2f}"),
        ("size", f"{price.num_bytes / 1e6:.1f} MB"),
        ("perplexity", f"{price.perplexity:.3f} (original {price.original_perplexity:.3f})"),
        ("KL from the original", f"{row.kl_nats:.4f} nats per token"),
        ("same most likely token", f"{row.agreement:.1%}"),
        ("read by", price.readers),
    ]
    print_table("Price", ("", ""), rows)
    for note in price.notes:
        sys.stdout.write(f"{note}\n")
    sys.stdout.write(f"{price.path}\n")
