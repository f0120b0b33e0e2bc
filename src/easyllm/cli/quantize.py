"""The `easyllm quantize` command."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from easyllm.cli.adapter import AdapterFolder
from easyllm.cli.merge import gate_cells
from easyllm.cli.models import Model
from easyllm.cli.options import FlagGroup, Values, checked_flags, with_flags
from easyllm.cli.output import JsonFlag, home_path, print_json, print_table
from easyllm.pipeline.quantize_options import MAX_KL, QuantizeOptions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from easyllm.pipeline.quantize_price import Price
    from easyllm.verify.export_gate import Gate

OPTIONS = FlagGroup(
    QuantizeOptions,
    *("method", "format", "type", "bits", "group_size", "asymmetric", "single", "override"),
    *("dtype", "act_order", "data", "samples", "length", "no_importance", "text", "dequantize"),
    metavars={
        "method": "rtn|gptq|awq|smoothquant|nf4|fp4|gptq-nf4|gptq-fp4|llm.int8",
        "format": "gptq|awq|compressed-tensors|bitsandbytes|gguf",
        "type": "q8_0|q6_k|q5_k|q4_k|q5_1|q5_0|q4_1|q4_0",
        "bits": "2|3|4|8",
        "override": "PATTERN=VALUE",
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
        Path | None,
        typer.Argument(
            callback=home_path, help="Folder to write; for GGUF, a file.", metavar="OUT"
        ),
    ] = None,
    *,
    options: Annotated[Values, OPTIONS],
    adapter: AdapterFolder = None,
    max_kl: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Largest mean KL divergence from the original, in nats per token; a result that "
            "exceeds it is not written, and the exit code is 1.",
        ),
    ] = MAX_KL,
    keep: Annotated[
        bool, typer.Option("--keep", help="Write the result even if it exceeds --max-kl.")
    ] = False,
    compare: Annotated[
        str | None,
        typer.Option(
            help="Instead of writing OUT, compare several methods and GGUF types, separated by "
            "commas.",
            metavar="NAME,NAME...",
        ),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Quantize a model to a file that other programs read, and measure what it costs.

    [bold]Examples[/bold]

        easyllm quantize smollm2 out/gptq --method gptq --bits 4 --group-size 64

        easyllm quantize runs/mine/adapter out/awq --method awq --asymmetric --data my-data.jsonl

        easyllm quantize smollm2 out/smollm2-q4_0.gguf --type q4_0

        easyllm quantize runs/sft-lora/adapter out/tuned.gguf --type q4_k

        easyllm quantize smollm2 --compare rtn,gptq,awq,nf4,q4_0 --samples 16 --length 256
    """
    from easyllm.core.errors import ConfigError
    from easyllm.models import split_adapter

    if (target is None) == (compare is None):
        raise ConfigError(
            "quantize writes one file or folder, or compares several ways without keeping them: "
            "give either OUT or --compare"
        )
    base, folder = split_adapter(model, adapter)
    if target is None:
        if keep or max_kl != MAX_KL:
            raise ConfigError(
                "--keep and --max-kl concern a result that is written; leave them out"
            )
        _compare(str(base), folder, compare or "", options, json_output=json_output)
    else:
        limits = {"max_kl": max_kl, "keep": keep}
        _write(str(base), folder, target, options, limits, json_output=json_output)


def _compare(
    source: str, adapter: Path | None, names: str, options: Values, *, json_output: bool
) -> None:
    from easyllm.pipeline import quantize as pipeline

    listed = [name.strip() for name in names.split(",") if name.strip()]
    ways = pipeline.variants(listed, options)
    prices = pipeline.compare(source, ways, adapter=adapter, begun=partial(_note_begun, list(ways)))
    if json_output:
        print_json({name: price.as_dict() for name, price in prices.items()})
    else:
        _print_table(prices)


def _note_begun(names: Sequence[str], name: str) -> None:
    """Says which of several ways is tried now, above the progress of its steps."""
    sys.stderr.write(f"{name} ({names.index(name) + 1} of {len(names)})\n")


def _write(
    source: str,
    adapter: Path | None,
    target: Path,
    options: Values,
    limits: dict[str, Any],
    *,
    json_output: bool,
) -> None:
    from easyllm.pipeline import quantize as pipeline
    from easyllm.verify.export_gate import GateError

    checked = checked_flags(QuantizeOptions, options, OPTIONS, source="quantize options")
    try:
        price = pipeline.quantize(source, target, checked, adapter=adapter, **limits)
    except GateError as error:
        if json_output:
            print_json({"path": None, "gate": error.gate.as_dict()})
        else:
            _print_gate(error.gate)
        raise
    if json_output:
        print_json(price.as_dict())
    else:
        _print(price)
    if price.complaint is not None:
        raise GateError(f"{price.complaint}; {str(target)!r} was kept", price.gate)


def _print_gate(gate: "Gate") -> None:
    """Prints how far each form of the model is from what it was made from."""
    title = f"Difference from {gate.reference} on {gate.text.num_tokens} tokens"
    columns = ("", "drift", "bound", "holds", "KL (nats)", "same top-1")
    print_table(title, columns, [gate_cells(row) for row in gate.rows])
    sys.stdout.write(f"text: {gate.text.source}\n")


def _print_table(prices: "Mapping[str, Price]") -> None:
    from easyllm.pipeline.quantize_price import COLUMNS, table

    print_table("What quantization costs", COLUMNS, table(prices))
    sys.stdout.write(
        "bits: per weight, all weights and scales counted; top-1: same most likely token\n"
    )
    for name, price in prices.items():
        for note in price.notes:
            sys.stdout.write(f"{name}: {note}\n")


def _print(price: "Price") -> None:
    row = price.row
    rows = [
        ("bits per weight", f"{price.bits_per_weight:.2f}"),
        ("size", f"{price.num_bytes / 1e6:.1f} MB"),
        ("perplexity", f"{price.perplexity:.3f} (original {price.original_perplexity:.3f})"),
        ("KL from the original", f"{row.kl_nats:.4f} nats per token"),
        ("same most likely token", f"{row.agreement:.1%}"),
        (
            "tokens per second",
            f"{price.tokens_per_s:.1f} (original {price.original_tokens_per_s:.1f})",
        ),
        ("time", f"{price.seconds:.0f} s"),
        ("read by", price.readers),
    ]
    print_table("Price", ("", ""), rows)
    _print_gate(price.gate)
    for note in price.notes:
        sys.stdout.write(f"{note}\n")
    sys.stdout.write(f"{price.path}\n")
