"""Before the first step: what will be trained, how long it takes, whether it fits."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from easyllm.core.device import memory_free_bytes
from easyllm.core.errors import ConfigError
from easyllm.core.progress import console, format_count, format_duration
from easyllm.nn.config import ModelConfig
from easyllm.plan.compute import estimate_time, training_flops
from easyllm.plan.machine import matmul_rate
from easyllm.plan.memory import estimate_training, ways_to_fit
from easyllm.plan.parameters import count_parameters
from easyllm.train.config import TrainConfig
from easyllm.train.material import Material
from easyllm.train.optim_config import SGDConfig
from easyllm.train.setup import compute_dtype

USUAL_MFU = 0.45
"""Share of the machine's rate a run of ours reaches, for the estimate of its time."""


def preflight(
    config: TrainConfig,
    model: ModelConfig,
    material: Material,
    total_steps: int,
    device: torch.device,
) -> float:
    """Prints what a run will do; returns the machine's matmul rate in FLOP/s."""
    out = console()
    out.print(f"data: {material.summary}", soft_wrap=True)
    for warning in material.warnings:
        out.print(f"warning: {warning}", soft_wrap=True)
    dtype = compute_dtype(config, device)
    rate = matmul_rate(dtype, device)
    epochs = total_steps / material.loader.steps_per_epoch
    tokens = int(material.tokens_per_epoch * epochs)
    row = min(config.data.max_seq_len, config.micro_batch_tokens)
    flops = training_flops(model, (row,), lora=config.adapter).total / row * tokens
    seconds = estimate_time(flops, rate, utilisation=USUAL_MFU)
    setup: dict[str, Any] = {
        "micro_batch_tokens": config.micro_batch_tokens,
        "row_tokens": row,
        "micro_batches": _micro_batches(config, material),
        "dtype": dtype,
        "optimizer": config.optimizer.kind,
        "int8_state": getattr(config.optimizer, "state", "fp32") == "int8",
        "momentum": isinstance(config.optimizer, SGDConfig) and config.optimizer.momentum > 0,
        "lora": config.adapter,
        "recompute": config.checkpoint_activations,
        "dropout": config.dropout > 0,
        "device_type": device.type,
    }
    memory = estimate_training(model, **setup)
    name = str(dtype).removeprefix("torch.")
    out.print(
        f"plan: {format_count(count_parameters(model).total)} parameters in {name}, {total_steps} steps, "
        f"{format_count(tokens)} tokens; about {format_duration(seconds)} at {rate / 1e9:.0f} GFLOP/s and "
        f"{memory.total / 1e9:.1f} GB",
        soft_wrap=True,
    )
    free = memory_free_bytes(device)
    if not memory.fits(free):
        helps = [change.what for change in ways_to_fit(model, free, **setup) if change.fits]
        out.print(
            f"warning: {free / 1e9:.1f} GB are free, fewer than the plan needs"
            + (f"; each of these alone would do: {', '.join(helps)}" if helps else ""),
            soft_wrap=True,
        )
    return rate


def _micro_batches(config: TrainConfig, material: Material) -> int:
    """Forward passes of a usual step."""
    tokens = config.batch_tokens
    if tokens is None:
        steps = material.loader.steps_per_epoch
        tokens = math.ceil(material.tokens_per_epoch / steps)
    return max(1, math.ceil(tokens / config.micro_batch_tokens))


@contextmanager
def memory_advice(config: TrainConfig) -> Iterator[None]:
    """Answers running out of memory with what to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, RuntimeError) and not any(
            words in text for words in ("out of memory", "can't allocate memory")
        ):
            raise
        advice = [f"lower micro_batch_tokens={config.micro_batch_tokens} (the step stays the same)"]
        if config.checkpoint_activations != "full":
            advice.append("set checkpoint_activations: full")
        if config.adapter is None:
            advice.append("train an adapter instead of every weight")
        raise ConfigError(f"out of memory; {', or '.join(advice)}") from None
