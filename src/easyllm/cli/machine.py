"""The `easyllm doctor` command."""

from typing import TYPE_CHECKING, Annotated

import typer

from easyllm.cli.output import JsonFlag, print_json, print_pairs

if TYPE_CHECKING:
    from easyllm.core.json_types import JsonObject


def register(app: typer.Typer) -> None:
    """Adds the `doctor` command to `app`."""
    app.command("doctor")(doctor)


def doctor(
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Measure the rates of matrix products and memory, and keep them for the planner; "
            "only on a machine without other load.",
        ),
    ] = False,
    json_output: JsonFlag = False,
) -> None:
    """Report what this machine can do: CPU, memory, devices, compiler, models.

    [bold]Examples[/bold]

        easyllm doctor

        easyllm doctor --measure --json
    """
    from easyllm.core.device import cache_folder, describe_machine
    from easyllm.core.errors import SourceError
    from easyllm.core.manifest import versions
    from easyllm.models.sources import KNOWN_MODELS, locate

    report = describe_machine() | {"versions": versions(), "cache": str(cache_folder())}
    for name in KNOWN_MODELS:
        try:
            report[f"model {name}"] = str(locate(name))
        except SourceError as error:
            report[f"model {name}"] = str(error)
    if measure:
        report["measured"] = _measure()
    if json_output:
        print_json(report)
        return
    shown = {k: ", ".join(map(str, v)) if isinstance(v, list) else v for k, v in report.items()}
    if measure:
        rates = report["measured"]
        shown["measured"] = (
            ", ".join(f"{k} {v / 1e9:.0f} GFLOP/s" for k, v in rates["flops_per_s"].items())
            + f", memory {rates['read_bytes_per_s'] / 1e9:.1f} GB/s; kept for easyllm plan"
        )
    shown["versions"] = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    print_pairs(shown)


def _measure() -> "JsonObject":
    """Measures this machine's rates, and keeps those of the CPU for the planner."""
    import torch

    from easyllm.core.device import bf16_is_fast, pick_device
    from easyllm.plan.calibration import keep_calibration
    from easyllm.plan.machine import matmul_rate, read_rate

    device = pick_device()
    dtypes = [torch.float32, *([torch.bfloat16] if bf16_is_fast(device) else [])]
    rates = {str(d).removeprefix("torch."): matmul_rate(d, device) for d in dtypes}
    reading = read_rate(device)
    if device.type == "cpu":
        keep_calibration(flops_per_s=rates, read_bytes_per_s=reading)
    return {"flops_per_s": rates, "read_bytes_per_s": reading, "device": str(device)}
