"""`easyllm plan RECIPE`: what a recipe's training requires, and how well the plan was met."""

import sys
from typing import TYPE_CHECKING

from easyllm.cli.output import print_json, print_table
from easyllm.cli.plan_page import at_peak
from easyllm.cli.plan_tables import gigabytes, memory_bar

if TYPE_CHECKING:
    from easyllm.train import RunPlan


def plan_recipe(source: str, overrides: list[str], *, json_output: bool) -> None:
    """Prints the plan of each training of a recipe."""
    from easyllm.pipeline import plan_recipe as plan

    found = plan(source, overrides)
    if json_output:
        print_json({"recipe": source, **found.as_dict()})
        return
    for name, training in found.trainings.items():
        print_table(name, ("", ""), _rows(training))
        sys.stdout.write(
            memory_bar({"process": training.process_bytes, **at_peak(training.memory)})
        )
    for line in found.waiting_lines():
        sys.stdout.write(line + "\n")


def _rows(found: "RunPlan") -> list[tuple[str, str]]:
    from easyllm.core.progress import format_count, format_duration

    memory = found.memory
    in_file = f", and {gigabytes(memory.paged)} in a file" if memory.paged else ""
    rows = [
        ("parameters", f"{found.parameters:,} in {found.dtype}"),
        ("trained", f"{found.trained_parameters:,}"),
        ("steps", f"{found.steps:,}, {format_count(found.tokens)} tokens"),
        (
            "time",
            f"about {format_duration(found.seconds)}, at {found.utilisation:.0%} of "
            f"{found.flops_per_s / 1e9:.0f} GFLOP/s",
        ),
        ("whole process", gigabytes(found.predicted_peak_bytes)),
        ("  interpreter and torch", gigabytes(found.process_bytes)),
        ("memory of the run", f"{gigabytes(memory.total)} (peak in the {memory.peak})"),
        ("  weights", gigabytes(memory.weights)),
        ("  gradients", gigabytes(memory.gradients)),
        ("  optimizer", gigabytes(memory.optimizer) + in_file),
        ("  activations", gigabytes(memory.activations)),
        *((f"  {name.replace('_', ' ')}", gigabytes(n)) for name, n in memory.copies.items()),
        ("free memory", gigabytes(found.free_bytes)),
    ]
    if found.helps:
        rows.append(("would fit with", "; or ".join(found.helps)))
    return rows


def calibrate_recipe(source: str, overrides: list[str], *, json_output: bool) -> None:
    """Runs three steps of a recipe, prints the errors of its plan, and keeps the correction."""
    from easyllm.core.progress import Progress
    from easyllm.pipeline.calibrate_plan import calibrate

    with Progress("three steps", total=1, unit="run") as progress:
        found = calibrate(source, overrides)
        progress.advance(1)
    if json_output:
        print_json(found.as_dict())
        return
    rows = [
        (each.name, gigabytes(round(each.planned)), gigabytes(round(each.measured)), _error(each))
        for each in found.memory
    ]
    seconds = found.seconds
    rows.append(("time", f"{seconds.planned:.1f} s", f"{seconds.measured:.1f} s", _error(seconds)))
    print_table(f"three steps of {source}", ("", "planned", "measured", "error"), rows)
    kept = found.kept
    factor = "" if kept.step_factor is None else f"buffers of a step times {kept.step_factor:.2f}, "
    sys.stdout.write(f"kept for this machine: {factor}utilisation {kept.utilisation:.0%}\n")


def _error(each: object) -> str:
    return f"{getattr(each, 'error', 0.0):+.1%}"
