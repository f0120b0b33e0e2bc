"""`easyllm plan --evening 4h`: what this machine trains in a given time."""

import sys
from typing import TYPE_CHECKING

from easyllm.cli.output import print_json, print_table
from easyllm.cli.plan_tables import gigabytes, rates_here
from easyllm.plan.options import PlanOptions

if TYPE_CHECKING:
    from easyllm.core.json_types import JsonObject
    from easyllm.nn.config import ModelConfig
    from easyllm.plan.fit import EveningRun

CANDIDATES = ("smollm2-135m", "qwen2.5-0.5b", "qwen3-0.6b", "tinyllama-1.1b")
"""Published sizes that are tried if no model is given."""
DEPTHS = (4, 8, 12)
"""Layers of the fresh models that are tried: 64 times as wide (nanochat)."""


def plan_evening(
    source: str | None, options: PlanOptions, context: int | None, *, json_output: bool
) -> None:
    """Prints what this machine trains until the evening is over."""
    import torch

    from easyllm.core.device import bf16_is_fast, pick_device
    from easyllm.models.describe import describe
    from easyllm.plan.budget import parse_duration
    from easyllm.plan.calibration import read_calibration
    from easyllm.plan.compute import USUAL_MFU
    from easyllm.plan.fit import evening_runs, fresh_optimum
    from easyllm.plan.process import PROCESS_BYTES

    assert options.evening is not None, "checked by the caller"
    seconds, rates = parse_duration(options.evening, "--evening"), rates_here()
    share = options.mfu or read_calibration().utilisation or USUAL_MFU
    if source is not None:
        configs = {source: describe(source)}
    else:
        configs = {name: describe(name) for name in CANDIDATES} | _fresh()
    runs = list(
        evening_runs(
            configs,
            seconds=seconds,
            flops_per_s=rates.flops_per_s,
            memory_bytes=rates.free_bytes - PROCESS_BYTES,
            context=context,
            dtype=torch.bfloat16 if bf16_is_fast(pick_device()) else torch.float32,
            utilisation=share,
        )
    )
    best = fresh_optimum(seconds, rates.flops_per_s, share)
    if json_output:
        print_json(
            {
                "seconds": seconds,
                "flops_per_s": round(rates.flops_per_s),
                "utilisation": share,
                "free_bytes": rates.free_bytes,
                "compute_optimal": best,
                "runs": [run.as_dict() for run in runs],
            }
        )
        return
    title = f"{options.evening} at {share:.0%} of {rates.flops_per_s / 1e9:.0f} GFLOP/s"
    _show(title, runs, best, rates.free_bytes)


def _show(title: str, runs: "list[EveningRun]", best: "JsonObject", free_bytes: int) -> None:
    """Prints the runs as a table, and the compute-optimal fresh model."""
    from easyllm.core.progress import format_count

    rows = [
        (
            run.model,
            run.method,
            f"{run.context:,}",
            run.batch,
            format_count(run.tokens),
            gigabytes(run.memory_bytes),
            run.note,
        )
        for run in runs
    ]
    columns = ("model", "method", "context", "batch", "tokens", "memory", "")
    print_table(title, columns, rows)
    if not runs:
        sys.stdout.write(
            f"nothing fits into {gigabytes(free_bytes)} of free memory; free some, or name a "
            "smaller model\n"
        )
    sys.stdout.write(
        f"a fresh model is best with {format_count(best['parameters'])} parameters and "
        f"{format_count(best['tokens'])} tokens in that time (20 tokens per parameter)\n"
    )


def _fresh() -> "dict[str, ModelConfig]":
    """Returns configurations of new models with SmolLM2's vocabulary, by name."""
    from easyllm.models import load_tokenizer
    from easyllm.models.scratch import ScratchConfig, scratch_model_config

    tokenizer = load_tokenizer("smollm2")
    return {
        f"new, depth {depth}": scratch_model_config(
            ScratchConfig(tokenizer="smollm2", depth=depth), tokenizer
        )
        for depth in DEPTHS
    }
