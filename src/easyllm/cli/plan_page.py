"""Gathers the figures of the page that `easyllm plan --html` writes."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from easyllm.cli.plan_tables import flops_text, gigabytes

if TYPE_CHECKING:
    from easyllm.nn.config import ModelConfig
    from easyllm.plan.hardware import Hardware
    from easyllm.plan.memory import MemoryEstimate
    from easyllm.plan.report import ModelPlan
    from easyllm.plan.serving import ServingCeiling

CACHES = {"16-bit": 2.0, "8-bit": 1.0, "4-bit": 0.5}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 96, 128)
POINTS = 32


def write_page(
    path: Path,
    source: str,
    config: "ModelConfig",
    found: "ModelPlan",
    hardware: "Hardware",
    gpus: int,
    formats: dict[str, Any],
) -> None:
    """Writes the page of a model's plan."""
    from easyllm.core.atomic import write_atomic
    from easyllm.plan.kv_cache import cache_size
    from easyllm.plan.serving import serving_ceiling
    from easyllm.reporting.plan_page import plan_page

    ceiling = serving_ceiling(config, hardware, gpus=gpus, context=found.context, **formats)
    serving = {k: v for k, v in found.serving.as_dict().items() if k != "total"}
    memory = {f"serving {found.sequences} x {found.context:,} tokens": serving}
    for step in found.training:
        memory[f"training, {step.name}, {step.tokens:,} tokens"] = at_peak(step.memory)
    lengths = [max(1, config.max_seq_len * i // POINTS) for i in range(POINTS + 1)]
    cache = {
        name: [(n, cache_size(config, context=n, itemsize=size).total / 1e9) for n in lengths]
        for name, size in CACHES.items()
    }
    name = hardware.name if gpus == 1 else f"{gpus} x {hardware.name}"
    charts = [
        (
            f"Time of a decoding step on {name}",
            "sequences",
            "milliseconds at least",
            {"step": [(n, 1e3 * ceiling.step_seconds(n)) for n in BATCHES]},
        ),
        (
            f"Throughput on {name}",
            "sequences",
            "tokens/s at most",
            {"all sequences": [(n, ceiling.tokens_per_s(n)) for n in BATCHES]},
        ),
        ("KV cache of one sequence", "tokens", "GB", cache),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, plan_page(f"Plan of {source}", _facts(found, ceiling), memory, charts))


def at_peak(memory: "MemoryEstimate") -> dict[str, int]:
    """Returns the components that exist at the highest peak of a training step."""
    held = {"weights": memory.weights, "optimizer": memory.optimizer, **memory.copies}
    rest = memory.total - sum(held.values())
    name = "gradients" if memory.peak in ("update", "embedding") else "activations"
    main = min(rest, getattr(memory, name))
    return held | {name: main, "buffers": rest - main}


def _facts(found: "ModelPlan", ceiling: "ServingCeiling") -> dict[str, str]:
    count = found.parameters
    facts = {"parameters": f"{count.total:,}"}
    if count.inactive:
        facts["active per token"] = f"{count.active:,}"
    return facts | {
        "weights": gigabytes(found.loaded),
        "KV cache per token": f"{found.cache.bytes_per_token:,} bytes",
        "forward pass per token": flops_text(found.forward_flops_per_token),
        "training per token": flops_text(found.training_flops_per_token),
        "requests that fit": f"{ceiling.most_requests:,} of {found.context:,} tokens",
        "tokens/s of one sequence": f"{ceiling.tokens_per_s(1):,.1f} at most",
    }


__all__ = ["at_peak", "write_page"]
