"""`easyllm plan --gpus`: the devices that are asked about, ways to split training, budgets."""

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from easyllm.cli.output import print_table
from easyllm.cli.plan_tables import gigabytes, memory_bar
from easyllm.plan.options import PlanOptions

if TYPE_CHECKING:
    from easyllm.core.json_types import JsonObject
    from easyllm.nn.config import ModelConfig
    from easyllm.plan.budget import Budget
    from easyllm.plan.hardware import Hardware
    from easyllm.plan.search import Search

SHOWN = 12
"""Ways that the table lists; `--json` has all."""


def devices(options: PlanOptions) -> "tuple[int, Hardware] | None":
    """Returns the number of devices and their profile; None if none are asked about.

    Raises:
        ConfigError: the device is not known, or a profile is given without a number of devices.
    """
    from easyllm.core.errors import ConfigError
    from easyllm.plan.hardware import find_hardware, parse_gpus, read_profile, with_options

    if options.gpus is None:
        if options.profile is not None:
            raise ConfigError("--profile describes devices; say how many with --gpus, such as 8")
        if options.price is not None:
            raise ConfigError("--price is that of a device; name the devices with --gpus")
        return None
    count, name = parse_gpus(options.gpus)
    if options.profile is not None:
        if name is not None:
            raise ConfigError(
                f"--gpus {options.gpus} names a GPU, and --profile describes one; give a number "
                "with --profile, such as --gpus 8"
            )
        found = read_profile(options.profile)
    elif name is None:
        raise ConfigError(
            f"--gpus {options.gpus} has no name; write it as {count}xH100-80GB, or describe the "
            "devices with --profile FILE"
        )
    else:
        found = find_hardware(name)
    return count, with_options(found, utilisation=options.mfu, price=options.price)


def search(
    config: "ModelConfig",
    gpus: int,
    hardware: "Hardware",
    options: PlanOptions,
    context: int | None,
) -> "Search":
    """Returns the ways to train a model on devices; sequences have at most 4096 tokens unless
    told otherwise."""
    from easyllm.plan.search import Wish, find_ways

    wish = Wish(
        batch=options.batch,
        tensor=options.tensor,
        pipeline=options.pipeline,
        stage=options.zero,
        recompute=options.recompute,
        micro_batch=options.micro_batch,
        offload=options.offload,
    )
    length = context or min(config.max_seq_len, 4096)
    return find_ways(config, hardware, gpus, context=length, wish=wish)


def run_budget(flops_per_token: float, tokens: float, hardware: "Hardware", gpus: int) -> "Budget":
    """Returns time and price of a run at the profile's utilisation."""
    from easyllm.plan.budget import budget

    return budget(flops_per_token * tokens, tokens, hardware, gpus)


def search_budget(found: "Search", tokens: float, gpus: int, hardware: "Hardware") -> "Budget":
    """Returns time and price of a run with the fastest way that fits."""
    from easyllm.plan.budget import budget

    best = found.fitting[0]
    flops = best.hardware_flops / best.tokens * tokens
    # the bubble and the traffic count too: the utilisation that the way reaches in the end
    return budget(flops, tokens, replace(hardware, utilisation=1.0), gpus, utilisation=best.hfu)


def as_dict(
    found: "Search", hardware: "Hardware", gpus: int, cost: "Budget | None"
) -> "JsonObject":
    """Returns a search as plain values for JSON."""
    values = {"count": gpus, "hardware": hardware.as_dict(), "training": found.as_dict()}
    return values if cost is None else values | {"run": cost.as_dict()}


def show(found: "Search", hardware: "Hardware", gpus: int, cost: "Budget | None") -> None:
    """Prints the ways that fit, fastest first, and why the others do not."""
    rows = [
        (
            way.split.name + (f", {way.split.recompute}" if way.split.recompute != "none" else ""),
            way.split.micro_batch,
            gigabytes(way.memory.total),
            f"{way.time.total:.3g} s",
            f"{way.tokens_per_s:,.0f}",
            f"{way.mfu:.1%}",
            f"{way.hfu:.1%}",
        )
        for way in found.fitting[:SHOWN]
    ]
    columns = ("split, recomputed", "rows", "memory", "step", "tokens/s", "MFU", "HFU")
    title = (
        f"full training on {gpus} x {hardware.name}, {found.batch:,} sequences per step, "
        f"{hardware.utilisation:.0%} of the peak while computing"
    )
    print_table(title, columns, rows)
    if found.fitting:
        best = found.fitting[0].memory
        parts = {k: v for k, v in best.as_dict().items() if k not in ("total", "host")}
        sys.stdout.write(memory_bar(parts, hardware.usable_bytes))
    for way in found.failing[:SHOWN]:
        missing = way.memory.total - hardware.usable_bytes
        sys.stdout.write(
            f"does not fit: {way.split.name} needs {gigabytes(way.memory.total)} at least, "
            f"{gigabytes(missing)} more than there are\n"
        )
    reasons: dict[str, list[str]] = {}
    for name, reason in found.refused.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        shown = "; ".join(names[:3]) + ("; ..." if len(names) > 3 else "")
        sys.stdout.write(f"not possible: {shown}: {reason}\n")
    if cost is not None:
        show_budget(cost)


def show_budget(cost: "Budget") -> None:
    """Prints time and price of a run."""
    from easyllm.core.progress import format_count

    price = "" if cost.price is None else f", price {cost.price:,.0f}"
    sys.stdout.write(
        f"{format_count(cost.tokens)} tokens: {cost.seconds / 86400:,.2f} days, "
        f"{cost.gpus * cost.seconds / 3600:,.0f} device-hours{price}\n"
    )


__all__ = ["as_dict", "devices", "run_budget", "search", "search_budget", "show", "show_budget"]
