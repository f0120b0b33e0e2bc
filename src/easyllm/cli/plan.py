"""The `easyllm plan` command."""

from pathlib import Path
from typing import Annotated, Any

import typer

from easyllm.cli.options import FlagGroup, Values, checked_flags, with_flags
from easyllm.cli.output import JsonFlag, Overrides, home_path
from easyllm.plan.options import PlanOptions

OPTIONS = FlagGroup(
    PlanOptions,
    *("gpus", "profile", "price", "mfu", "batch", "micro_batch", "tensor", "pipeline"),
    *("interleave", "zero", "offload", "recompute", "tokens", "step_seconds", "tokens_per_s"),
    *("fit", "evening", "formulas", "shape"),
    metavars={
        "gpus": "NxNAME",
        "profile": "FILE",
        "zero": "0|1|2|3",
        "offload": "none|optimizer|all",
        "recompute": "none|selective|full",
        "tokens": "COUNT",
        "tokens_per_s": "RATE",
        "fit": "SIZE",
        "evening": "DURATION",
        "shape": "KEY=N,...",
    },
)

Scheme = Annotated[
    str | None, typer.Option(help="Quantize the weights.", metavar="int8|int4|nf4|fp4")
]
DeepSpeedFile = Annotated[
    str | None,
    typer.Option(
        "--ds-config",
        metavar="FILE",
        help="A ds_config.json: bytes and messages of each process of a full fine-tune.",
    ),
]
Calibrate = Annotated[
    bool,
    typer.Option(
        "--calibrate",
        help="Run three steps of a recipe, compare them with the plan, keep the correction.",
    ),
]
Html = Annotated[
    Path | None,
    typer.Option(callback=home_path, help="Also write a page with plots.", metavar="FILE"),
]


def register(app: typer.Typer) -> None:
    """Adds the `plan` command to `app`."""
    app.command("plan")(plan)


@with_flags
def plan(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL|RECIPE",
            help="A published size such as llama2-7b, smollm2, a folder, a .gguf, a config.json; "
            "a number of parameters such as 7.5B; or a recipe.",
        ),
    ] = None,
    overrides: Overrides = None,
    *,
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
    quantize: Scheme = None,
    cache_dtype: Annotated[
        str | None,
        typer.Option(help="KV cache dtype: bfloat16 (the default), float32, int8, int4."),
    ] = None,
    train: Annotated[
        bool, typer.Option("--train", help="Also plan training steps of the model.")
    ] = False,
    options: Annotated[Values, OPTIONS],
    calibrate: Calibrate = False,
    html: Html = None,
    ds_config: DeepSpeedFile = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="With --ds-config: number of processes; by default 8."),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    r"""Estimate parameters, memory, FLOPs and time of a model or training run without loading it.

    For a recipe: what its training requires on this machine.

    [bold]Examples[/bold]

        easyllm plan llama2-7b

        easyllm plan mixtral-8x7b --context 32768 --sequences 8 --quantize int4 --json

        easyllm plan llama2-70b --train --gpus 64xA100-80GB --tokens 1T --price 2

        easyllm plan qwen2.5-7b --fit 24GB

        easyllm plan --evening 4h

        easyllm plan 175B --gpus 1024xA100-80GB --mfu 0.45 --tokens 300B --recompute full

        easyllm plan gpt3-175b --formulas --batch 64

        easyllm plan smollm2 --train --html plan.html

        easyllm plan sft-lora epochs=3

        easyllm plan sft-lora --calibrate

        easyllm plan llama2-7b --ds-config ds_config.json --processes 8
    """
    asked: dict[str, Any] = {"context": context, "sequences": sequences, "dtype": dtype}
    asked |= {"quantize": quantize, "cache-dtype": cache_dtype, "html": html}
    asked["train"] = train or None  # None if not given, like the others
    flags = {name.replace("_", "-"): value for name, value in _given(options).items()}
    if ds_config is not None:
        from easyllm.cli.plan_deepspeed import plan_deepspeed

        unused = asked | flags | {"calibrate": calibrate or None}
        _check_unused("--ds-config, which describes the training", unused, overrides or [])
        plan_deepspeed(source, ds_config, processes or 8, json_output=json_output)
        return
    if processes is not None:
        from easyllm.core.errors import ConfigError

        raise ConfigError("--processes applies to --ds-config FILE; remove it, or give a file")
    words, given = overrides or [], asked | flags
    _dispatch(source, words, given, options, calibrate=calibrate, json_output=json_output)


def _check_unused(what: str, asked: dict[str, Any], overrides: list[str]) -> None:
    """Checks that nothing is given that would have no effect on a kind of plan.

    Raises:
        ConfigError: something is.
    """
    from easyllm.core.errors import ConfigError

    given = [f"--{name}" for name, value in asked.items() if value is not None]
    unused = [*given, *overrides]
    if unused:
        raise ConfigError(f"{unused[0]} has no effect on {what}; leave it out")


def _given(options: Values) -> dict[str, Any]:
    """Returns the options that differ from their defaults."""
    fields = PlanOptions.model_fields
    return {name: value for name, value in options.items() if value != fields[name].default}


def _dispatch(
    source: str | None,
    overrides: list[str],
    asked: dict[str, Any],
    options: Values,
    *,
    calibrate: bool,
    json_output: bool,
) -> None:
    """Plans an evening, a recipe, a number of parameters or a model."""
    from easyllm.core.errors import ConfigError

    checked = checked_flags(PlanOptions, options, OPTIONS, source="plan options")
    if source is None or (checked.evening is not None and not _is_recipe(source)):
        kept = {name: v for name, v in asked.items() if name not in ("evening", "context", "mfu")}
        if checked.evening is not None:
            kept["calibrate"] = calibrate or None
            _check_unused("--evening, which tries every method", kept, overrides)
        _plan_evening(source, checked, asked, json_output=json_output)
        return
    if _is_recipe(source):
        given = [name for name, value in asked.items() if value is not None and value is not False]
        if given:
            raise ConfigError(
                f"--{given[0]} applies to a model; a recipe defines its own training, "
                "which KEY=VALUE changes"
            )
        from easyllm.cli.plan_recipe import calibrate_recipe, plan_recipe

        (calibrate_recipe if calibrate else plan_recipe)(source, overrides, json_output=json_output)
        return
    if calibrate:
        raise ConfigError(
            f"--calibrate runs three steps of a recipe, but {source!r} is a model; name a recipe, "
            "such as sft-lora"
        )
    if overrides:
        raise ConfigError(f"{overrides[0]!r} overrides a recipe key, but {source!r} is a model")
    from easyllm.cli.plan_model import is_count, plan_a_model, plan_count

    if is_count(source):
        plan_count(source, asked, checked, json_output=json_output)
    else:
        plan_a_model(source, asked, checked, json_output=json_output)


def _is_recipe(source: str) -> bool:
    """Returns whether `source` is a recipe: by its suffix, or as the name of a built-in one."""
    from easyllm.core.run_folder import recipes_folder

    return source.endswith((".yaml", ".yml")) or (recipes_folder() / f"{source}.yaml").is_file()


def _plan_evening(
    source: str | None, options: PlanOptions, asked: dict[str, Any], *, json_output: bool
) -> None:
    from easyllm.cli.plan_evening import plan_evening
    from easyllm.core.errors import ConfigError

    if options.evening is None:
        raise ConfigError("plan needs a model or a recipe; name one, or give --evening 4h")
    plan_evening(source, options, asked["context"], json_output=json_output)
