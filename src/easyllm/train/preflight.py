"""Checks before the first step: what will be trained, how long it takes, whether it fits."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from easyllm.batches.loader import StepSize
from easyllm.batches.shared_prompts import shares_prompts
from easyllm.core.device import memory_free_bytes
from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonObject
from easyllm.core.progress import console, format_count, format_duration
from easyllm.nn.config import ModelConfig
from easyllm.nn.decoder import Decoder
from easyllm.nn.encoder_decoder import build_model as build_decoder
from easyllm.ops.huge_memory import STEP_BUFFERS
from easyllm.plan.calibration import read_calibration
from easyllm.plan.compute import USUAL_MFU, estimate_time, training_flops
from easyllm.plan.inference import loaded_weight_bytes
from easyllm.plan.machine import matmul_rate, read_rate
from easyllm.plan.memory import (
    MemoryEstimate,
    ReferenceKind,
    estimate_training,
    memory_reductions,
)
from easyllm.plan.parameters import count_parameters
from easyllm.plan.parts import count_adapter_parameters, virtual_tokens
from easyllm.plan.process import LOADED_LATER, later_bytes, process_bytes
from easyllm.quant import KEPT
from easyllm.train.config import TrainConfig
from easyllm.train.data_config import CorpusDataConfig
from easyllm.train.factories import BaseModelSource, build_model, cannot_train_all
from easyllm.train.objectives import MemorySetup, Objective, Speed
from easyllm.train.optim_config import SGDConfig, adamw_of
from easyllm.train.precision import compute_dtype
from easyllm.train.training_data import TrainingData

FEW_STEPS, ENOUGH_STEPS = 20, 50
"""A run with fewer steps than the first number prints a warning, which advises the second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """The work, estimated time and memory of a run.

    Attributes:
        parameters: number of parameters of the model.
        trained_parameters: number of trainable parameters (the adapter's, if there is one).
        dtype: compute dtype.
        steps: number of optimizer steps.
        tokens: number of tokens over all steps.
        flops: FLOPs of the forward and backward passes of all steps.
        flops_per_s: measured matmul rate of the machine.
        seconds: estimated time of all steps, at `utilisation` of that rate.
        utilisation: `USUAL_MFU`, or what was measured with `easyllm plan --calibrate`.
        memory: estimated peak memory of what the run allocates.
        process_bytes: memory of the interpreter, torch and the data, before anything is allocated,
            and of what they load later.
        load_bytes: weights and the files that they are read from, which are mapped until all are
            read; 0 for a new model.
        later_bytes: share of `process_bytes` that is loaded after the weights.
        step_factor: measured correction of what a step allocates (`plan.calibration`).
        free_bytes: memory of the device that is free now.
        device_type: `cpu` or `cuda`.
        helps: changes that would each be enough to make the run fit; empty if it fits.
    """

    parameters: int
    trained_parameters: int
    dtype: str
    steps: int
    tokens: int
    flops: int
    flops_per_s: float
    seconds: float
    utilisation: float
    memory: MemoryEstimate
    process_bytes: int
    load_bytes: int = 0
    later_bytes: int = LOADED_LATER
    step_factor: float = 1.0
    free_bytes: int
    device_type: str = "cpu"
    helps: tuple[str, ...] = ()

    @property
    def predicted_peak_bytes(self) -> int:
        """Estimated peak of the whole process's memory; on a GPU, without what is on the GPU."""
        return max(self._loading_bytes, self._step_bytes)

    @property
    def peak(self) -> str:
        """When the process's memory is highest: `load`, or a peak of the step on a CPU."""
        in_step = self.device_type == "cpu" and self._step_bytes > self._loading_bytes
        return self.memory.peak if in_step else "load"

    @property
    def _loading_bytes(self) -> int:
        """The process while weights are read: what it loads later is not there yet."""
        return self.process_bytes - self.later_bytes + self.load_bytes

    @property
    def _step_bytes(self) -> int:
        """The process in a step."""
        on_host = self.memory.total if self.device_type == "cpu" else 0
        return self.process_bytes + on_host + self.correction_bytes

    @property
    def correction_bytes(self) -> int:
        """What the calibration of this machine adds, on a CPU: a share of the step's buffers."""
        if self.device_type != "cpu":
            return 0
        memory = self.memory
        held = memory.weights + memory.optimizer + sum(memory.copies.values())
        return round((self.step_factor - 1) * (memory.total - held))

    def predictions(self) -> JsonObject:
        """Returns what the manifest of the run keeps, to compare it with what was measured."""
        found: JsonObject = {
            "dtype": self.dtype,
            "predicted_peak_bytes": self.predicted_peak_bytes,
            "uncorrected_peak_bytes": replace(self, step_factor=1.0).predicted_peak_bytes,
            "predicted_seconds": float(f"{self.seconds:.3g}"),
            "predicted_utilisation": self.utilisation,
            "predicted_bytes": {
                "process": self.process_bytes,
                **self.memory.components(),
                "load": self.load_bytes,
                "peak": self.peak,
            },
        }
        if self.device_type != "cpu":
            found["predicted_device_bytes"] = self.memory.total
        return found

    def line(self) -> str:
        """Returns the plan as one line of text."""
        return (
            f"plan: {format_count(self.parameters)} parameters in {self.dtype}, "
            f"{self.steps} steps, {format_count(self.tokens)} tokens; about "
            f"{format_duration(self.seconds)} at {self.utilisation:.0%} of "
            f"{self.flops_per_s / 1e9:.0f} GFLOP/s, and {self.memory.total / 1e9:.1f} GB "
            f"next to the process's {self.process_bytes / 1e9:.1f} GB"
        )

    def as_dict(self) -> JsonObject:
        """Returns the plan as JSON-compatible values; bytes and FLOPs are integers."""
        return {
            "parameters": self.parameters,
            "trained_parameters": self.trained_parameters,
            "dtype": self.dtype,
            "steps": self.steps,
            "tokens": self.tokens,
            "flops": self.flops,
            "flops_per_s": round(self.flops_per_s),
            "seconds": round(self.seconds, 1),
            "memory_bytes": self.memory.as_dict(),
            "process_bytes": self.process_bytes,
            "predicted_peak_bytes": self.predicted_peak_bytes,
            "free_bytes": self.free_bytes,
            "fits": self.memory.fits(self.free_bytes),
            "helps": list(self.helps),
        }


def planned(config: TrainConfig, objective: Objective) -> TrainConfig:
    """Returns the configuration for planning, with the modules that the objective fully trains."""
    if config.adapter is None or not objective.also_trained:
        return config
    names = dict.fromkeys((*config.adapter.also_trained, *objective.also_trained))
    adapter = config.adapter.model_copy(update={"also_trained": tuple(names)})
    return config.model_copy(update={"adapter": adapter})


def planned_model(
    config: TrainConfig, origin: BaseModelSource, objective: Objective
) -> ModelConfig:
    """Returns the configuration of the model to train, with the objective's head if it adds one."""
    return empty_model(config, origin, objective).config


def empty_model(config: TrainConfig, origin: BaseModelSource, objective: Objective) -> Decoder:
    """Returns the model to train on the device `meta`, without values and without adapters."""
    with torch.device("meta"):
        return objective.prepare_model(build_decoder(origin.config), seed=config.seed)


def preflight(
    config: TrainConfig,
    model: ModelConfig,
    objective: Objective,
    training_data: TrainingData,
    total_steps: int,
    device: torch.device,
    flops_per_s: float | None = None,
    file_bytes: int = 0,
) -> RunPlan:
    """Prints the data, the plan and any warnings of a run; returns the plan.

    Raises:
        ConfigError: an adapter does not fit the model.
    """
    out = console()
    out.print(f"data: {training_data.summary}", soft_wrap=True)
    for warning in (*training_data.warnings, *few_steps(config, training_data, total_steps)):
        out.print(f"warning: {warning}", soft_wrap=True)
    plan = plan_run(
        config, model, objective, training_data, total_steps, device, flops_per_s, file_bytes
    )
    out.print(plan.line(), soft_wrap=True)
    if not plan.memory.fits(plan.free_bytes):
        out.print(
            f"warning: {plan.free_bytes / 1e9:.1f} GB are free, less than the plan needs"
            + (
                f"; any one of these would be enough: {', '.join(plan.helps)}" if plan.helps else ""
            ),
            soft_wrap=True,
        )
    return plan


def few_steps(config: TrainConfig, training_data: TrainingData, total_steps: int) -> list[str]:
    """Returns a warning if a run is too short to learn much, unless `max_steps` is the reason.

    It names the smallest change of each key that would give at least `ENOUGH_STEPS` steps.
    """
    if total_steps >= FEW_STEPS or total_steps == config.max_steps:
        return []
    epoch = training_data.loader.steps_per_epoch
    if config.max_tokens is not None and total_steps < math.ceil(epoch * config.epochs):
        enough = math.ceil(ENOUGH_STEPS * training_data.tokens_per_epoch / epoch)
        advice = f"raise max_tokens (max_tokens={enough})"
    else:
        advice = f"raise epochs (epochs={math.ceil(ENOUGH_STEPS / epoch)})"
        key = "batch_size" if config.batch_size is not None else "batch_tokens"
        smaller = _smaller_batch(config, training_data)
        advice += f" or lower {key} ({key}={smaller})" if smaller >= 1 else ""
    steps = "1 step" if total_steps == 1 else f"{total_steps} steps"
    return [f"only {steps}: too few to learn much from; {advice}"]


def plan_run(
    config: TrainConfig,
    model: ModelConfig,
    objective: Objective,
    training_data: TrainingData,
    total_steps: int,
    device: torch.device,
    flops_per_s: float | None = None,
    file_bytes: int = 0,
) -> RunPlan:
    """Estimates time and memory of a run from its configuration and the machine's matmul rate.

    `file_bytes` is the size of the files that the weights are read from.

    Raises:
        ConfigError: an adapter does not fit the model.
    """
    dtype = compute_dtype(config, device)
    epochs = total_steps / training_data.loader.steps_per_epoch
    tokens = int(training_data.tokens_per_epoch * epochs)
    step = training_data.loader.largest_step(total_steps)
    row = min(config.data.max_seq_len, config.micro_batch_tokens)
    computed = tokens - _shared_tokens(config, model, training_data, epochs)
    read = training_data.encoder_tokens(model, row)
    of_row = training_flops(model, (row,), adapter=config.adapter, prefixes=read).total
    flops = of_row / row * computed
    setup = _memory_setup(config, model, objective, step, dtype, device)
    memory = estimate_training(model, **setup)
    rate, free = flops_per_s or matmul_rate(dtype, device), memory_free_bytes(device)
    measured, recomputes = read_calibration(), config.checkpoint_activations != "none"
    utilisation = measured.utilisation or USUAL_MFU
    helps = () if memory.fits(free) else memory_reductions(model, free, **setup)

    def speed() -> Speed:
        reading = measured.read_bytes_per_s or read_rate(device, repeats=1)
        return Speed(
            itemsize=dtype.itemsize,
            flops_per_s=rate * utilisation,
            read_bytes_per_s=reading,
        )

    count, adapter = count_parameters(model).total, config.adapter
    return RunPlan(
        parameters=count,
        trained_parameters=count if adapter is None else count_adapter_parameters(model, adapter),
        dtype=str(dtype).removeprefix("torch."),
        steps=total_steps,
        tokens=tokens,
        flops=round(flops),
        flops_per_s=rate,
        seconds=estimate_time(flops, rate, utilisation=utilisation)
        + objective.sampling_seconds(model, training_data.loader, total_steps, speed),
        utilisation=utilisation,
        memory=memory,
        process_bytes=process_bytes(recomputes=recomputes),
        later_bytes=later_bytes(recomputes=recomputes),
        load_bytes=_load_bytes(model, dtype, setup["scheme"], file_bytes),
        step_factor=measured.step_factor or 1.0,
        free_bytes=free,
        device_type=device.type,
        helps=tuple(change.what for change in helps if change.fits),
    )


def _memory_setup(
    config: TrainConfig,
    model: ModelConfig,
    objective: Objective,
    step: StepSize,
    dtype: torch.dtype,
    device: torch.device,
) -> JsonObject:
    """Returns what the memory of a run depends on, as arguments of `estimate_training`."""
    # blocks of a GGUF file have at most 8.5 bits a weight
    scheme = "int8" if config.quantize == KEPT else config.quantize
    held = MemorySetup(itemsize=dtype.itemsize, adapter=config.adapter, scheme=scheme, step=step)
    return {
        "micro_batch_tokens": step.tokens,
        "row_tokens": step.longest,
        "micro_batches": step.micro_batches,
        "labelled": step.trained,
        "dtype": dtype,
        "optimizer": config.optimizer.kind,
        "int8_state": getattr(config.optimizer, "state", "fp32") == "int8",
        "paged": pages_state(config),
        "momentum": isinstance(config.optimizer, SGDConfig) and config.optimizer.momentum > 0,
        "adapter": config.adapter,
        "scheme": scheme,
        "recompute": config.checkpoint_activations,
        "dropout": config.dropout > 0,
        "reference": _reference_kind(objective),
        "copies": objective.held_bytes(model, held),
        "device_type": device.type,
    }


def _load_bytes(model: ModelConfig, dtype: torch.dtype, scheme: str | None, file_bytes: int) -> int:
    """Returns the bytes of loaded weights and of the mapped files; 0 without files."""
    return file_bytes + loaded_weight_bytes(model, dtype.itemsize, scheme) if file_bytes else 0


def _shared_tokens(
    config: TrainConfig, model: ModelConfig, data: TrainingData, epochs: float
) -> int:
    """Returns the tokens of prompts that are computed once for several sequences."""
    if not shares_prompts(model, virtual_tokens(model, config.adapter)):
        return 0
    return int(data.shared_per_epoch * epochs)


def _reference_kind(objective: Objective) -> ReferenceKind | None:
    """Returns which reference model is in memory during the steps."""
    if not objective.needs_reference:
        return None
    return "initial" if objective.reference_source is None else "other"


def pages_state(config: TrainConfig) -> bool:
    """Returns whether a run's optimizer state is in a file."""
    adamw = adamw_of(config.optimizer)
    return adamw is not None and adamw.paged


def check_paged(config: TrainConfig, device: torch.device) -> None:
    """Checks that the device supports a paged optimizer, if the recipe sets one.

    Raises:
        ConfigError: it does not.
    """
    if pages_state(config) and device.type != "cpu":
        raise ConfigError(
            f"optimizer.paged=true is not supported on {device.type}, only on a CPU, because the "
            "moments would cross the bus in every step; set optimizer.state=int8, or device=cpu"
        )


def check_model(config: TrainConfig, origin: BaseModelSource, objective: Objective) -> None:
    """Builds the model to train on the meta device, to check weights, head, adapter and groups.

    Raises:
        ConfigError, CheckpointError: the run itself would reject one of them.
    """
    with torch.device("meta"):
        empty = build_decoder(origin.config)
    origin.check(empty)
    if origin.packed is not None:
        name = origin.packed.name
        if config.adapter is None:
            raise cannot_train_all(config, [name])
        reason = config.adapter.unsupported_reason(name)
        if reason is not None:
            raise ConfigError(
                f"an adapter of kind {config.adapter.kind} does not work on weights stored as "
                f"{name}: {reason}"
            )
    bare = replace(origin, build=lambda dtype, _: empty.to(dtype))
    build_model(config, bare, objective, torch.device("meta"))


def _smaller_batch(config: TrainConfig, training_data: TrainingData) -> int:
    """Returns the largest step, in the recipe's unit, that gives at least `ENOUGH_STEPS` steps."""
    tokens = training_data.tokens_per_epoch
    if isinstance(config.data, CorpusDataConfig):
        sequences = math.ceil(tokens / config.data.max_seq_len)
    else:
        sequences = training_data.figures["samples"]
    if config.batch_size is not None:
        return int(sequences * config.epochs / ENOUGH_STEPS)
    # a step ends after the sequence that reaches batch_tokens
    return int(tokens * config.epochs / ENOUGH_STEPS - tokens / sequences)


@contextmanager
def memory_advice(config: TrainConfig) -> Iterator[None]:
    """Context manager that turns out-of-memory errors into advice on what to lower.

    On exit, it frees the buffers that training steps have cached.

    Raises:
        ConfigError: the body ran out of memory.
    """
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
    finally:
        STEP_BUFFERS.clear()
