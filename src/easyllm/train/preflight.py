"""Before the first step: what will be trained, how long it takes, whether it fits."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from easyllm.core.errors import ConfigError
from easyllm.core.progress import console, format_count, format_duration
from easyllm.nn.config import ModelConfig
from easyllm.plan.compute import estimate_time, training_flops
from easyllm.plan.machine import matmul_rate
from easyllm.plan.memory import estimate_training
from easyllm.plan.parameters import count_parameters
from easyllm.train.config import TrainConfig
from easyllm.train.material import Material
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
    memory = estimate_training(
        model,
        micro_batch_tokens=config.micro_batch_tokens,
        row_tokens=row,
        dtype=dtype,
        optimizer=config.optimizer.kind,
        int8_state=getattr(config.optimizer, "state", "fp32") == "int8",
        lora=config.adapter,
        recompute=config.checkpoint_activations,
    )
    name = str(dtype).removeprefix("torch.")
    out.print(
        f"plan: {format_count(count_parameters(model).total)} parameters in {name}, {total_steps} steps, "
        f"{format_count(tokens)} tokens; about {format_duration(seconds)} at {rate / 1e9:.0f} GFLOP/s and "
        f"{memory.total / 1e9:.1f} GB",
        soft_wrap=True,
    )
    return rate


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
