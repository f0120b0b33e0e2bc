"""The `easyllm plan` command."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from easyllm.cli.output import JsonFlag, Overrides, print_json, print_pairs, print_table

if TYPE_CHECKING:
    from easyllm.nn.config import ModelConfig
    from easyllm.plan.report import ModelPlan, Rates
    from easyllm.train import RunPlan


def register(app: typer.Typer) -> None:
    """Adds the `plan` command to `app`."""
    app.command("plan")(plan)


def plan(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|RECIPE",
            help="A published size such as llama2-7b, smollm2, a folder, a .gguf, a config.json; "
            "or a recipe.",
        ),
    ],
    overrides: Overrides = None,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens per sequence; by default the model's maximum."),
    ] = None,
    sequences: Annotated[
        int | None, typer.Option(min=1, help="Sequences served concurrently; by default 1.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Weight dtype: bfloat16 (the default), float32 ...")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="Quantize the weights.", metavar="int8|int4|nf4|fp4")
    ] = None,
    cache_dtype: Annotated[
        str | None,
        typer.Option(help="KV cache dtype: bfloat16 (the default), float32, int8, int4."),
    ] = None,
    train: Annotated[
        bool, typer.Option("--train", help="Also plan training steps of the model.")
    ] = False,
    json_output: JsonFlag = False,
) -> None:
    """Estimate parameters, memory, FLOPs and time of a model or training run without loading it.

    For a recipe: what its training requires on this machine.

    [bold]Examples[/bold]

        easyllm plan llama2-7b

        easyllm plan mixtral-8x7b --context 32768 --sequences 8 --quantize int4 --json

        easyllm plan smollm2 --train

        easyllm plan sft-lora epochs=3
    """
    from easyllm.core.errors import ConfigError

    options = {
        "context": context,
        "sequences": sequences,
        "dtype": dtype,
        "quantize": quantize,
        "cache-dtype": cache_dtype,
        "train": train or None,  # None if not given, like the others
    }
    if _is_recipe(source):
        given = [name for name, value in options.items() if value is not None]
        if given:
            raise ConfigError(
                f"--{given[0]} applies to a model; a recipe defines its own training, "
                "which KEY=VALUE changes"
            )
        _plan_recipe(source, overrides or [], json_output)
        return
    if overrides:
        raise ConfigError(f"{overrides[0]!r} overrides a recipe key, but {source!r} is a model")
    _plan_model(source, json_output, **options)


def _is_recipe(source: str) -> bool:
    """Returns whether `source` is a recipe: by its suffix, or as the name of a built-in one."""
    from easyllm.core.run_folder import recipes_folder

    return source.endswith((".yaml", ".yml")) or (recipes_folder() / f"{source}.yaml").is_file()


def _plan_recipe(source: str, overrides: list[str], json_output: bool) -> None:
    from easyllm.pipeline import plan_recipe

    plan = plan_recipe(source, overrides)
    if json_output:
        print_json({"recipe": source, **plan.as_dict()})
        return
    for name, found in plan.trainings.items():
        print_table(name, ("", ""), _rows_of_run(found))
    for line in plan.waiting_lines():
        sys.stdout.write(line + "\n")


def _rows_of_run(found: "RunPlan") -> list[tuple[str, str]]:
    from easyllm.core.progress import format_count, format_duration
    from easyllm.plan.compute import USUAL_MFU

    memory = found.memory
    in_file = f", and {_gb(memory.paged)} in a file" if memory.paged else ""
    rows = [
        ("parameters", f"{found.parameters:,} in {found.dtype}"),
        ("trained", f"{found.trained_parameters:,}"),
        ("steps", f"{found.steps:,}, {format_count(found.tokens)} tokens"),
        (
            "time",
            f"about {format_duration(found.seconds)}, at {USUAL_MFU:.0%} of "
            f"{found.flops_per_s / 1e9:.0f} GFLOP/s",
        ),
        ("memory", f"{_gb(memory.total)} (peak in the {memory.peak})"),
        ("  weights", _gb(memory.weights)),
        ("  gradients", _gb(memory.gradients)),
        ("  optimizer", _gb(memory.optimizer) + in_file),
        ("  activations", _gb(memory.activations)),
        ("free memory", _gb(found.free_bytes)),
    ]
    if found.helps:
        rows.append(("would fit with", "; or ".join(found.helps)))
    return rows


def _plan_model(source: str, json_output: bool, **options: Any) -> None:
    from easyllm.core.device import parse_dtype
    from easyllm.engine.kv_cache import cache_format, cache_itemsize
    from easyllm.models.describe import describe
    from easyllm.plan import plan_model
    from easyllm.quant import find_scheme

    weights = parse_dtype(options["dtype"] or "bfloat16")
    scheme = options["quantize"]
    if scheme is not None:
        find_scheme(scheme)
    kept_as = cache_format(options["cache-dtype"], parse_dtype("bfloat16"))
    config = describe(source)
    found = plan_model(
        config,
        context=options["context"],
        sequences=options["sequences"] or 1,
        itemsize=weights.itemsize,
        scheme=scheme,
        cache_itemsize=cache_itemsize(config, kept_as),
        train=bool(options["train"]),
    )
    rates = _rates_here()
    if json_output:
        formats = {
            "dtype": _name(weights),
            "quantize": scheme,
            "cache_dtype": _name(kept_as),
        }
        print_json({"model": source, "family": config.family} | formats | found.as_dict(rates))
        return
    _show(source, config, found, rates)


def _rates_here() -> "Rates":
    from easyllm.core.device import bf16_is_fast, memory_free_bytes, parse_dtype, pick_device
    from easyllm.plan.machine import matmul_rate, read_rate
    from easyllm.plan.report import Rates

    device = pick_device()
    dtype = parse_dtype("bfloat16" if bf16_is_fast(device) else "float32")
    return Rates(
        flops_per_s=matmul_rate(dtype, device, repeats=3),
        read_bytes_per_s=read_rate(device, repeats=1),
        free_bytes=memory_free_bytes(device),
    )


def _show(source: str, config: "ModelConfig", found: "ModelPlan", rates: "Rates") -> None:
    count, serving = found.parameters, found.serving
    rows = [("parameters", f"{count.total:,}")]
    if count.inactive:
        rows.append(("  active per token", f"{count.active:,}"))
    rows += [
        ("weights, float32", _gb(found.weights["float32"])),
        ("weights, bfloat16", _gb(found.weights["bfloat16"])),
        ("weights, int8", _gb(found.weights["int8"])),
        ("weights, int4", _gb(found.weights["int4"])),
        ("weights, nf4", _gb(found.weights["nf4"])),
        ("KV cache per token", f"{found.cache.bytes_per_token:,} bytes"),
        (f"KV cache, {found.sequences} x {found.context:,} tokens", _gb(found.cache.total)),
        (
            "serving",
            f"{_gb(serving.total)} (weights {_gb(serving.weights)}, KV cache "
            f"{_gb(serving.kv_cache)}, workspace {_gb(serving.workspace)})",
        ),
        ("forward pass per token", _flops(found.forward_flops_per_token)),
        (f"decoding token {found.context:,}", _flops(found.token_flops)),
        ("training per token", _flops(found.training_flops_per_token)),
    ]
    for step in found.training:
        rows.append(
            (
                f"training step, {step.name}",
                f"{step.tokens:,} tokens, {_flops(step.flops.total)}, {_gb(step.memory.total)} "
                f"({step.trained_parameters:,} parameters trained)",
            )
        )
    print_table(f"{source} ({config.family})", ("", ""), rows)
    here = {
        "this machine": f"{rates.flops_per_s / 1e9:.0f} GFLOP/s, "
        f"{rates.read_bytes_per_s / 1e9:.1f} GB/s, {_gb(rates.free_bytes)} free"
    }
    seconds = found.seconds(rates)
    here |= {name.replace("_", " "): _seconds(name, value) for name, value in seconds.items()}
    if not serving.fits(rates.free_bytes):
        here["serving here"] = "does not fit into free memory"
    print_pairs(here)
    if found.context > config.max_seq_len:
        sys.stdout.write(
            f"note: the model was trained for {config.max_seq_len:,} tokens; "
            "--context exceeds that\n"
        )


def _seconds(name: str, seconds: float) -> str:
    from easyllm.plan.compute import USUAL_MFU

    if name.startswith("training_step_"):
        return f"about {seconds:g} s, at {USUAL_MFU:.0%} of these rates"
    return f"{seconds:g} s at these rates; more in practice"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.2f} GB"


def _flops(flops: int) -> str:
    from easyllm.core.progress import format_count

    text = format_count(flops)
    prefix = text[-1] if text[-1].isalpha() else ""
    return f"{text.removesuffix(prefix)} {prefix}FLOP"


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
