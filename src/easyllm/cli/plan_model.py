"""`easyllm plan MODEL`: the costs of a model, or of a number of parameters."""

import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from easyllm.cli import plan_gpus
from easyllm.cli.output import print_json, print_pairs, print_table
from easyllm.cli.plan_tables import flops_text, gigabytes, memory_bar, rates_here, this_machine
from easyllm.plan.options import PlanOptions

if TYPE_CHECKING:
    from easyllm.core.json_types import JsonObject
    from easyllm.nn.config import ModelConfig
    from easyllm.plan.budget import Budget
    from easyllm.plan.fit import Fit
    from easyllm.plan.formulas import FormulaSetup
    from easyllm.plan.hardware import Hardware
    from easyllm.plan.report import ModelPlan, Rates
    from easyllm.plan.search import Search
    from easyllm.plan.serving import ServingCeiling

NEEDS_FORMULAS = ("step_seconds", "tokens_per_s")
OF_SHAPE = ("batch", "micro_batch", "tensor", "pipeline", "interleave", "zero", "offload")
OF_DEVICES = (*OF_SHAPE, "recompute", "mfu")
"""Options without effect unless devices or formulas are asked for."""


def is_count(source: str) -> bool:
    """Returns whether a source is a number of parameters, such as `7.5B`."""
    return re.fullmatch(r"[0-9][0-9_,.]*(e[0-9]+)?[kmbgt]?", source.lower()) is not None


def plan_count(
    source: str, asked: dict[str, Any], options: PlanOptions, *, json_output: bool
) -> None:
    """Prints what follows from a number of parameters alone."""
    from easyllm.core.errors import ConfigError
    from easyllm.plan.budget import parse_count
    from easyllm.plan.formulas import parse_shape, run_formulas, shape_formulas, state_formulas

    other = ("sequences", "dtype", "quantize", "cache-dtype", "html", "fit")
    for name in other:
        if asked.get(name) is not None:
            raise ConfigError(
                f"--{name} needs a model's shape, but {source} is a number of parameters; name a "
                "model or a config.json"
            )
    if options.formulas and options.shape is None:
        raise ConfigError(
            "--formulas needs a shape; add --shape layers=L,hidden=H,heads=A,vocab=V, or name a "
            "model"
        )
    _check_count(source, asked, options)
    for name in () if options.formulas else (*OF_SHAPE, "step_seconds"):
        if getattr(options, name) != PlanOptions.model_fields[name].default:
            raise ConfigError(
                f"--{name.replace('_', '-')} has no effect on a number of parameters; name a "
                "model, or add --shape and --formulas"
            )
    parameters = round(parse_count(source, "MODEL"))
    on = plan_gpus.devices(options)
    setup = _formula_setup(options, on, asked["context"] or 2048)
    shape = None if options.shape is None else parse_shape(options.shape)
    values: JsonObject = {"parameters_total": parameters}
    values |= state_formulas(parameters, setup.gpus) | run_formulas(parameters, setup, shape)
    if shape is not None and options.formulas:
        values["formulas"] = shape_formulas(shape, setup)
    if setup.tokens is not None and on is not None:
        factor = 8 if options.recompute == "full" else 6
        cost = plan_gpus.run_budget(factor * parameters, setup.tokens, on[1], on[0])
        values["run"] = cost.as_dict()
    if json_output:
        print_json({"model": source, **values})
        return
    rows = list(_flat(values))
    print_table(f"{source} parameters", ("", ""), rows)


def _check_count(source: str, asked: dict[str, Any], options: PlanOptions) -> None:
    """Checks what only a shape, or a run of some tokens on devices, makes use of.

    Raises:
        ConfigError: an option would have no effect.
    """
    from easyllm.core.errors import ConfigError

    if asked["context"] is not None and options.shape is None:
        raise ConfigError(
            f"--context needs a model's shape, but {source} is a number of parameters; add "
            "--shape layers=L,hidden=H,heads=A,vocab=V, or name a model or a config.json"
        )
    for name in ("mfu", "recompute", "price"):
        given = getattr(options, name) != PlanOptions.model_fields[name].default
        if given and (options.tokens is None or options.gpus is None):
            raise ConfigError(
                f"--{name} changes the time and price of a run; name it with --tokens and --gpus"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Extras:
    """What the options add to the plan of a model.

    Attributes:
        gpus, hardware: the devices, or this machine.
        serving: ceilings on them.
        search: ways to split training over devices; None if none are asked about.
        cost: days and price of a run with the fastest way.
        fit: what fits into a memory.
        formulas: closed forms of publications.
    """

    gpus: int
    hardware: "Hardware"
    serving: "ServingCeiling"
    search: "Search | None"
    cost: "Budget | None"
    fit: "list[Fit]"
    formulas: "JsonObject"

    def as_dict(self) -> "JsonObject":
        """Returns plain values for JSON, without what was not asked for."""
        found: JsonObject = {"serving": self.serving.as_dict()}
        if self.search is not None:
            found["gpus"] = plan_gpus.as_dict(self.search, self.hardware, self.gpus, self.cost)
        if self.fit:
            found["fit"] = [each.as_dict() for each in self.fit]
        return found | ({"formulas": self.formulas} if self.formulas else {})


def plan_a_model(
    source: str, asked: dict[str, Any], options: PlanOptions, *, json_output: bool
) -> None:
    """Prints the costs of a model of a known shape."""
    from easyllm.core.device import parse_dtype, pick_device
    from easyllm.engine.kv_cache import cache_format, cache_itemsize
    from easyllm.plan import plan_model
    from easyllm.quant import find_scheme

    _check(source, options)
    weights, scheme = parse_dtype(asked["dtype"] or "bfloat16"), asked["quantize"]
    if scheme is not None:
        find_scheme(scheme)
    kept_as = cache_format(asked["cache-dtype"], parse_dtype("bfloat16"))
    config, on = _described(source), plan_gpus.devices(options)
    formats: dict[str, Any] = {
        "itemsize": weights.itemsize,
        "scheme": scheme,
        "cache_itemsize": cache_itemsize(config, kept_as),
        "device_type": pick_device().type if on is None else "cuda",
    }
    found = plan_model(
        config,
        context=asked["context"],
        sequences=asked["sequences"] or 1,
        train=bool(asked["train"]),
        **formats,
    )
    rates = rates_here() if on is None else None
    extras = _extras(config, asked, options, formats, on, rates)
    if asked["html"] is not None:
        from easyllm.cli.plan_page import write_page

        write_page(asked["html"], source, config, found, extras.hardware, extras.gpus, formats)
    if json_output:
        names = {"dtype": _name(weights), "quantize": scheme, "cache_dtype": _name(kept_as)}
        plan = found.as_dict(rates) | extras.as_dict()
        print_json({"model": source, "family": config.family} | names | plan)
        return
    _show(source, config, found, rates)
    _show_extras(extras, options)
    if found.context > config.max_seq_len:
        sys.stdout.write(
            f"note: the model was trained for {config.max_seq_len:,} tokens; "
            "--context exceeds that\n"
        )


def _described(source: str) -> "ModelConfig":
    """Returns the configuration of a source; an unknown one is told what else can be planned."""
    from easyllm.core.errors import SourceError
    from easyllm.models.describe import describe

    try:
        return describe(source)
    except SourceError as error:
        raise SourceError(
            f"{error}; plan also takes a recipe, such as sft-lora, and a number of parameters, "
            "such as 7B"
        ) from None


def _check(source: str, options: PlanOptions) -> None:
    """Checks that no option is given that would have no effect.

    Raises:
        ConfigError: one is.
    """
    from easyllm.core.errors import ConfigError

    if options.shape is not None:
        raise ConfigError(f"--shape is for a number of parameters, but {source!r} has a shape")
    for name in NEEDS_FORMULAS:
        if getattr(options, name) is not None and not options.formulas:
            raise ConfigError(
                f"--{name.replace('_', '-')} is compared with published formulas; add --formulas"
            )
    if options.tokens is not None and options.gpus is None:
        raise ConfigError("--tokens needs devices to be trained on; add --gpus")
    if options.price is not None and options.gpus is not None and options.tokens is None:
        raise ConfigError("--price is that of a run; say how long it is with --tokens, such as 1T")
    for name in () if options.gpus or options.formulas else OF_DEVICES:
        if getattr(options, name) != PlanOptions.model_fields[name].default:
            raise ConfigError(
                f"--{name.replace('_', '-')} is of a training on devices; name them with --gpus"
            )


def _extras(
    config: "ModelConfig",
    asked: dict[str, Any],
    options: PlanOptions,
    formats: dict[str, Any],
    on: "tuple[int, Hardware] | None",
    rates: "Rates | None",
) -> _Extras:
    """Returns what the options add to the plan of a model, on devices or on this machine."""
    from easyllm.plan.budget import parse_size
    from easyllm.plan.fit import fits_into
    from easyllm.plan.formulas import shape_formulas, state_formulas
    from easyllm.plan.parameters import count_parameters
    from easyllm.plan.published import Shape
    from easyllm.plan.serving import serving_ceiling

    context = asked["context"] or config.max_seq_len
    search: Search | None = None
    cost: Budget | None = None
    fit: list[Fit] = []
    formulas: JsonObject = {}
    if on is not None:
        gpus, hardware = on
        search, tokens = plan_gpus.search(config, *on, options, asked["context"]), _tokens(options)
        if tokens is not None and search.fitting:
            cost = plan_gpus.search_budget(search, tokens, *on)
    else:
        assert rates is not None, "measured where no devices are named"
        gpus, hardware = 1, this_machine(rates)
    if options.fit is not None:
        size = parse_size(options.fit, "--fit")
        of_any = {name: value for name, value in formats.items() if name != "device_type"}
        fit = list(fits_into(config, size, context=context, **of_any))
    if options.formulas:
        setup = _formula_setup(options, on, context)
        formulas = shape_formulas(Shape.of(config), setup)
        formulas |= state_formulas(count_parameters(config).total, setup.gpus)
    serving = serving_ceiling(config, hardware, gpus=gpus, context=context, **formats)
    return _Extras(
        gpus=gpus,
        hardware=hardware,
        serving=serving,
        search=search,
        cost=cost,
        fit=fit,
        formulas=formulas,
    )


def _tokens(options: PlanOptions) -> float | None:
    from easyllm.plan.budget import parse_count

    return None if options.tokens is None else parse_count(options.tokens, "--tokens")


def _formula_setup(
    options: PlanOptions, on: "tuple[int, Hardware] | None", context: int
) -> "FormulaSetup":
    from easyllm.plan.budget import parse_count
    from easyllm.plan.formulas import FormulaSetup

    gpus, hardware = on if on is not None else (1, None)
    rate = options.tokens_per_s
    batch, pipeline = options.batch or 1, options.pipeline or 1
    data = max(1, gpus // (pipeline * (options.tensor or 1)))
    return FormulaSetup(
        batch=batch,
        context=context,
        gpus=gpus,
        tensor=options.tensor or 1,
        pipeline=pipeline,
        interleave=options.interleave,
        micro_batches=max(1, batch // (data * (options.micro_batch or 1))),
        tokens=_tokens(options),
        peak_flops_per_s=None if hardware is None else hardware.flops_per_s,
        step_seconds=options.step_seconds,
        tokens_per_s=None if rate is None else parse_count(rate, "--tokens-per-s"),
    )


# ---- tables


def _show(source: str, config: "ModelConfig", found: "ModelPlan", rates: "Rates | None") -> None:
    count, serving = found.parameters, found.serving
    rows = [("parameters", f"{count.total:,}")]
    if count.inactive:
        rows.append(("  active per token", f"{count.active:,}"))
    rows += [
        (f"weights, {name}", gigabytes(found.weights[name]))
        for name in ("float32", "bfloat16", "int8", "int4", "nf4")
    ]
    rows += [
        ("KV cache per token", f"{found.cache.bytes_per_token:,} bytes"),
        (f"KV cache, {found.sequences} x {found.context:,} tokens", gigabytes(found.cache.total)),
        (
            "serving",
            f"{gigabytes(serving.total)} (weights {gigabytes(serving.weights)}, KV cache "
            f"{gigabytes(serving.kv_cache)}, workspace {gigabytes(serving.workspace)}"
            + (f", heap {gigabytes(serving.heap)})" if serving.heap else ")"),
        ),
        ("forward pass per token", flops_text(found.forward_flops_per_token)),
        (f"decoding token {found.context:,}", flops_text(found.token_flops)),
        ("training per token", flops_text(found.training_flops_per_token)),
    ]
    for step in found.training:
        rows.append(
            (
                f"training step, {step.name}",
                f"{step.tokens:,} tokens, {flops_text(step.flops.total)}, "
                f"{gigabytes(step.memory.total)} "
                f"({step.trained_parameters:,} parameters trained)",
            )
        )
    print_table(f"{source} ({config.family})", ("", ""), rows)
    parts = {k: v for k, v in serving.as_dict().items() if k != "total"}
    sys.stdout.write(memory_bar(parts, None if rates is None else rates.free_bytes))
    if rates is None:
        return
    here = {
        "this machine": f"{rates.flops_per_s / 1e9:.0f} GFLOP/s, "
        f"{rates.read_bytes_per_s / 1e9:.1f} GB/s, {gigabytes(rates.free_bytes)} free"
    }
    seconds = found.seconds(rates)
    here |= {name.replace("_", " "): _seconds(name, value) for name, value in seconds.items()}
    if not serving.fits(rates.free_bytes):
        here["serving here"] = "does not fit into free memory"
    print_pairs(here)


def _show_extras(extras: _Extras, options: PlanOptions) -> None:
    print_pairs(_serving_lines(extras.serving))
    if extras.search is not None:
        plan_gpus.show(extras.search, extras.hardware, extras.gpus, extras.cost)
    if extras.fit:
        rows = [
            (
                each.use if each.recompute in (None, "none") else f"{each.use}, recomputed",
                f"{each.sequences:,} x {each.context:,}",
                f"{each.longest:,}",
                gigabytes(each.needed),
            )
            for each in extras.fit
        ]
        columns = ("use", "largest batch", "longest sequence", "one sequence needs")
        print_table(f"fits into {options.fit}", columns, rows)
    if extras.formulas:
        print_table("published formulas", ("", ""), list(_flat(extras.formulas)))


def _serving_lines(found: "ServingCeiling") -> dict[str, str]:
    most, crossover = found.most_requests, found.crossover
    lines = {
        "requests that fit": f"{most:,} of {found.context:,} tokens",
        "tokens/s at most": f"{found.tokens_per_s(1):,.1f} for one sequence"
        + (f", {found.tokens_per_s(most):,.0f} for {most:,}" if most > 1 else ""),
        "time to first token": f"{found.first_token_seconds:.3g} s at least, for "
        f"{found.context:,} tokens",
    }
    if crossover is not None:
        lines["compute-bound from"] = f"{crossover:,} sequences on"
    else:
        lines["compute-bound from"] = "never: reading the cache takes longer than computing"
    return lines


def _flat(values: "JsonObject", prefix: str = "") -> list[tuple[str, str]]:
    """Returns nested figures as rows of text."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        label = f"{prefix}{name.replace('_', ' ')}"
        if isinstance(value, dict):
            rows += _flat(value, f"{label}, ")
        else:
            rows.append((label, f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"))
    return rows


def _seconds(name: str, seconds: float) -> str:
    from easyllm.plan.compute import USUAL_MFU

    if name.startswith("training_step_"):
        return f"about {seconds:g} s, at {USUAL_MFU:.0%} of these rates"
    return f"{seconds:g} s at these rates; more in practice"


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


__all__ = ["is_count", "plan_a_model", "plan_count"]
