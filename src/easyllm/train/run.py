"""A training run, from its configuration to its result on disk.

run/recipe.yaml      the resolved configuration
run/metrics.jsonl    one line per logged step; run/report.html plots it
run/checkpoints/     to resume from after an interruption
run/adapter/         the trained adapter, or run/model/ if all weights are trained
run/manifest.json    inputs, versions, results; written last, so its presence marks completion
"""

import math
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from easyllm.adapters import save_adapter
from easyllm.core.atomic import write_atomic, write_json
from easyllm.core.device import peak_memory_bytes, peak_rss_bytes, pick_device
from easyllm.core.errors import ConfigError, Interrupted, OutputError
from easyllm.core.manifest import MANIFEST_FILE, Manifest, hash_value
from easyllm.core.progress import console
from easyllm.core.run_folder import check_run_folder, claim_run_folder
from easyllm.models import hf_module_name, save_model
from easyllm.models.hf_config import GENERATION_FILE, with_end_ids
from easyllm.plan.parts import virtual_tokens
from easyllm.tokenizer.turn_ends import turn_end_ids
from easyllm.train.config import TrainConfig
from easyllm.train.data_config import DataConfig
from easyllm.train.factories import (
    BaseModelSource,
    Trained,
    build_model,
    build_precision_policy,
    build_reference,
    find_base_model,
    input_hashes,
    source_name,
)
from easyllm.train.loop import Diverged, run_steps
from easyllm.train.objectives import Objective, build_objective
from easyllm.train.preflight import (
    RunPlan,
    check_model,
    memory_advice,
    planned,
    planned_model,
    preflight,
)
from easyllm.train.report import write_report
from easyllm.train.signals import stop_on_signals
from easyllm.train.state import BEST, FOLDER, RunState, Totals, load_newest, load_state
from easyllm.train.training_data import TrainingData, load_training_data
from easyllm.train.watch import RunWatch, check_samples, evaluation_of, samples_of, step_flops

ADAPTER, MODEL = "adapter", "model"
RESUMABLE_CHANGES = frozenset(
    {
        *("log_every", "eval_every", "save_every", "keep_last", "samples", "tensorboard"),
        *("device", "spike_factor", "checkpoint_activations", "compile"),
    }
)
"""Keys that may differ on resume if the user allows it: none of them affects what is learned."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The result of a run.

    Attributes:
        output: the run's folder.
        figures: the run's final metrics, as in its manifest.
    """

    output: Path
    figures: dict[str, Any]


def train(config: TrainConfig, output: Path, *, allow_change: bool = False) -> TrainResult:
    """Runs a training, or resumes an interrupted one in the same folder.

    Args:
        config: the run's configuration.
        output: the run's folder.
        allow_change: whether a run may resume with other values of the `RESUMABLE_CHANGES` keys.

    Raises:
        OutputError: `output` contains another run, or a finished one.
        ConfigError, DataError, SourceError, CheckpointError: the inputs are invalid.
        Interrupted: a signal stopped the run; the same call resumes it.
        Diverged: the loss or a gradient was NaN or infinite in three consecutive steps, or a weight
            is at the end.
    """
    ignore = _resumable_changes(config) if allow_change else frozenset[str]()
    check_output(output, config, ignore=ignore)
    ready = prepare(config)
    with memory_advice(config):
        trained = build_model(config, ready.origin, ready.objective, ready.device)
        if ready.objective.needs_reference:
            ready.objective.reference = build_reference(
                config, ready.origin, ready.objective, trained
            )
        claim_run_folder(
            output, config, ignore=ignore
        )  # only now, so that an error leaves no empty folder
        return _run(config, output, ready, trained)


def dry_run(config: TrainConfig, output: Path | None, *, allow_change: bool = False) -> RunPlan:
    """Runs all checks of `train` and prints the plan, without reading weights or writing files.

    Args:
        config: the run's configuration.
        output: the run's folder; None if it is checked elsewhere.
        allow_change: as for `train`.

    Returns:
        The plan of the run.

    Raises:
        EasyllmError: whatever `train` raises before its first step.
    """
    if output is not None:
        ignore = _resumable_changes(config) if allow_change else frozenset[str]()
        check_output(output, config, ignore=ignore)
    ready = prepare(config)
    check_model(config, ready.origin)
    return ready.plan


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything a run needs before its weights are read."""

    device: torch.device
    origin: BaseModelSource
    objective: Objective
    training_data: TrainingData
    plan: RunPlan


def prepare(config: TrainConfig) -> Prepared:
    """Locates the model, reads the data and prints the plan.

    Raises:
        ConfigError, DataError, SourceError, CheckpointError: the inputs are invalid.
    """
    device = pick_device(config.device)
    origin = find_base_model(config)
    objective = build_objective(config.objective)
    model = planned_model(config, origin, objective)
    context = model.max_seq_len - virtual_tokens(model, config.adapter)
    training_data = load_training_data(config, origin.tokenizer, objective, context=context)
    check_samples(config.samples, origin.tokenizer, context=context)
    total_steps = count_steps(config, training_data)
    plan = preflight(planned(config, objective), model, training_data, total_steps, device)
    return Prepared(device, origin, objective, training_data, plan)


def check_output(output: Path, config: TrainConfig, *, ignore: Collection[str] = ()) -> None:
    """Checks that the run can be started or resumed in `output`.

    Raises:
        OutputError: the folder contains another run, or this run is finished, or the folder cannot
            be written.
    """
    check_run_folder(output, config, ignore=ignore)
    if (output / MANIFEST_FILE).is_file():
        raise OutputError(
            f"{str(output)!r} already contains this run, finished; choose another output folder, "
            "or remove that one"
        )


def count_steps(config: TrainConfig, training_data: TrainingData) -> int:
    """Returns the number of optimizer steps of the complete run.

    Raises:
        ConfigError: the number is 0.
    """
    epoch = training_data.loader.steps_per_epoch
    steps = math.ceil(epoch * config.epochs)
    if config.max_tokens is not None:
        steps = min(steps, math.ceil(config.max_tokens * epoch / training_data.tokens_per_epoch))
    steps = min(steps, config.max_steps or steps)
    if steps < 1:
        raise ConfigError(
            f"the recipe results in {steps} steps ({epoch} per epoch, epochs={config.epochs}); "
            "raise epochs or lower batch_size"
        )
    return steps


def _run(
    config: TrainConfig,
    output: Path,
    ready: Prepared,
    trained: Trained,
) -> TrainResult:
    torch.manual_seed(config.seed)
    origin, training_data, objective = ready.origin, ready.training_data, ready.objective
    total_steps, peak = ready.plan.steps, ready.plan.flops_per_s
    model, optimizer, adapters = trained.model, trained.optimizer, trained.adapters
    totals, identity = Totals(), input_hashes(origin)
    state = RunState(
        optimizer,
        training_data.loader,
        totals,
        identity | {"data": _joined(training_data)},
        adapters=adapters,
    )
    precision = build_precision_policy(config, model.config, model.device)
    resumed, messages = load_newest(output, state)
    for message in messages:
        console().print(message, soft_wrap=True)
    if precision.scaler is not None:
        precision.scaler.load_state(state.extra.get("loss_scaler"))
    watch = RunWatch(
        output,
        config,
        state,
        evaluate=evaluation_of(training_data.evaluate, model, objective),
        samples=samples_of(config.samples, model, origin.tokenizer),
        scaler=precision.scaler,
        flops=step_flops(model.config, config),
        peak=peak,
        total_steps=total_steps,
    )
    if resumed:
        watch.event(totals.step, "resumed", f"resumed at step {totals.step} of {total_steps}")
    start = time.monotonic()
    # until the end, so that a signal after the last step does not prevent writing the result
    with stop_on_signals() as stop:
        try:
            # otherwise the run was stopped early, but killed before it wrote its result
            if "stopped" not in state.extra:
                run_steps(
                    model,
                    objective,
                    optimizer,
                    training_data.loader,
                    config,
                    precision=precision,
                    totals=totals,
                    total_steps=total_steps,
                    watch=watch,
                    stop=stop,
                    adapters=adapters,
                )
            if "stopped" in state.extra:
                watch.event(totals.step, "stopped", state.extra["stopped"])
            elif stop.signal is not None and totals.step < total_steps:
                watch.save()
                raise Interrupted(
                    f"interrupted after step {totals.step} of {total_steps}; run the same command "
                    "to resume",
                    stop.signal,
                )
            if not optimizer.is_finite():
                raise Diverged(
                    f"a weight is NaN or infinite after step {totals.step}; lower the learning "
                    "rate (the last good checkpoint is kept)"
                )
            figures = _figures(totals, training_data, time.monotonic() - start)
            if model.device.type != "cpu":
                figures["peak_device_bytes"] = peak_memory_bytes(model.device)
            watch.look(totals.step)
            evaluated = watch.evaluated
            if config.keep_best and (output / FOLDER / BEST).is_dir():
                figures["best_step"] = _restore_best(output, state)
                if watch.evaluate is not None:
                    evaluated = watch.evaluate()
            figures |= {k.replace("eval/", "eval_"): v for k, v in evaluated.items()}
        finally:
            watch.close()
        _save_result(config, output, trained, origin)
        manifest = Manifest.create(
            "train",
            config=config.model_dump(mode="json"),
            inputs=identity | training_data.inputs,
            results=figures,
        )
        write_atomic(output / MANIFEST_FILE, manifest.model_dump_json(indent=2) + "\n")
        write_report(output)
    return TrainResult(output, figures)


def _resumable_changes(config: TrainConfig) -> frozenset[str]:
    """Returns the `RESUMABLE_CHANGES` keys, without `eval_every` if evaluations affect the result."""
    decides = config.early_stopping is not None or config.keep_best
    return RESUMABLE_CHANGES - {"eval_every"} if decides else RESUMABLE_CHANGES


def _figures(totals: Totals, training_data: TrainingData, seconds: float) -> dict[str, Any]:
    return {
        "steps": totals.step,
        "tokens": totals.tokens,
        "trained_tokens": totals.trained_tokens,
        "skipped_steps": totals.skipped,
        "seconds": round(seconds, 2),
        "data": training_data.figures,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _restore_best(output: Path, state: RunState) -> int:
    """Restores the weights with the lowest evaluation loss; returns their step."""
    load_state(output / FOLDER / BEST, state)
    return state.totals.step


def _joined(training_data: TrainingData) -> str:
    return hash_value(sorted(training_data.inputs.values()))


def _save_result(
    config: TrainConfig,
    output: Path,
    trained: Trained,
    origin: BaseModelSource,
) -> None:
    model = trained.model
    on_conversations = isinstance(config.data, DataConfig)
    ends = turn_end_ids(origin.tokenizer) if on_conversations else ()
    # save the fp32 master weights, not the low-precision copies
    for name, value in trained.optimizer.final_state().items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    if trained.adapters is not None:
        save_adapter(
            model,
            output / ADAPTER,
            module_name=hf_module_name(model),
            base=source_name(config),
            replace=True,
        )
        if ends:
            ids = with_end_ids(model.config, ends).eos_token_ids
            write_json(output / ADAPTER / GENERATION_FILE, {"eos_token_id": list(ids)})
        return
    save_model(model, output / MODEL, tokenizer=origin.tokenizer, end_ids=ends, replace=True)
