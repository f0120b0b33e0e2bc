"""A training run, from its configuration to its result on disk.

run/recipe.yaml      the resolved configuration
run/metrics.jsonl    one line per logged step, evaluation and event
run/reference.json   log-probabilities of the reference model, if the objective caches them
run/checkpoints/     to resume from after an interruption
run/adapter/         the trained adapter, or run/model/ if all weights are trained
run/manifest.json    inputs, versions, results; written last, so its presence marks completion
"""

import math
import signal
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from easyllm.core.atomic import write_atomic
from easyllm.core.device import peak_memory_bytes, peak_rss_bytes, pick_device
from easyllm.core.errors import ConfigError, Interrupted, OutputError
from easyllm.core.json_types import JsonObject
from easyllm.core.manifest import MANIFEST_FILE, Manifest
from easyllm.core.progress import console
from easyllm.core.run_folder import check_run_folder, claim_run_folder
from easyllm.models import save_model
from easyllm.parallel.mesh import Mesh, leave, world_size
from easyllm.plan.parts import virtual_tokens
from easyllm.train.callbacks import build_callbacks, check_samples, retention_samples
from easyllm.train.config import TrainConfig
from easyllm.train.deepspeed import with_deepspeed
from easyllm.train.deepspeed_backend import check_backend
from easyllm.train.division import join_ranks, naming_late_ranks, share_data
from easyllm.train.factories import (
    BaseModelSource,
    Trained,
    build_model,
    build_reference,
    check_reference,
    find_base_model,
    input_hashes,
)
from easyllm.train.footprint import measured_bytes
from easyllm.train.loop import Diverged, run_steps
from easyllm.train.objectives import Objective, RunSetup, build_objective
from easyllm.train.paged_memory import check_paging, existing_folder
from easyllm.train.precision import build_precision_policy
from easyllm.train.preflight import (
    RunPlan,
    check_model,
    check_paged,
    memory_advice,
    pages_state,
    planned,
    planned_model,
    preflight,
)
from easyllm.train.progress import TrainProgress
from easyllm.train.reference_cache import cache_reference
from easyllm.train.result import end_ids, save_trained_adapter, set_full_parameters
from easyllm.train.signals import StopRequest, stop_on_signals
from easyllm.train.state import load_newest
from easyllm.train.training_data import TrainingData, load_training_data
from easyllm.train.training_run import Callback, Run, step_flops

ADAPTER, MODEL = "adapter", "model"
RESUMABLE_CHANGES = frozenset(
    {
        *("log_every", "eval_every", "save_every", "keep_last", "samples", "tensorboard"),
        "save_async",
        *("device", "spike_factor", "checkpoint_activations", "compile", "retention"),
    }
)
"""Keys that may differ on resume if the user allows it: none of them affects what is learned."""
RELAUNCHED = frozenset({"parallel"})
"""Keys that may differ on every resume: a checkpoint can be read by other ranks and layouts."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The result of a run.

    Attributes:
        output: the run's folder.
        figures: the run's final metrics, as in its manifest.
    """

    output: Path
    figures: JsonObject


def train(
    config: TrainConfig,
    output: Path,
    *,
    callbacks: Sequence[Callback] = (),
    allow_change: bool = False,
) -> TrainResult:
    """Runs a training, or resumes an interrupted one in the same folder.

    Args:
        config: the run's configuration.
        output: the run's folder.
        callbacks: called in addition to those of every run, such as
            `easyllm.reporting.reporting_callbacks(config)` for `report.html` and TensorBoard.
        allow_change: whether a run may resume with other values of the `RESUMABLE_CHANGES` keys.

    Raises:
        OutputError: `output` contains another run, or a finished one.
        ConfigError, DataError, SourceError, CheckpointError: the inputs are invalid.
        Interrupted: a signal stopped the run; the same call resumes it.
        Diverged: the loss or a gradient was NaN or infinite in three consecutive steps, or a weight
            is at the end.
    """
    _check_implemented(config, callbacks)
    config = with_deepspeed(config, world_size())
    check_backend(config, world_size())
    ignore = RELAUNCHED | (_resumable_changes(config) if allow_change else frozenset[str]())
    mesh = join_ranks(config)
    if mesh is None or mesh.is_first:
        check_output(output, config, ignore=ignore)
    ready = prepare(config, mesh)
    with memory_advice(config):
        folder = existing_folder(output)
        trained = build_model(config, ready.origin, ready.objective, ready.device, folder, mesh)
        if ready.objective.needs_reference:
            ready.objective.reference = build_reference(
                config, ready.origin, ready.objective, trained
            )
        # only now, so that an error leaves no empty folder
        with ExitStack() as claims:
            if mesh is None or mesh.is_first:
                claims.enter_context(claim_run_folder(output, config, ignore=ignore))
                _check_unfinished(output)
            return _run(build_run(config, output, ready, trained, callbacks))


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
    config = with_deepspeed(config, world_size())
    check_backend(config, 0)
    if output is not None:
        ignore = RELAUNCHED | (_resumable_changes(config) if allow_change else frozenset[str]())
        check_output(output, config, ignore=ignore)
    ready = prepare(config)
    if output is not None and pages_state(config):
        check_paging(existing_folder(output))
    check_model(config, ready.origin, ready.objective)
    return ready.plan


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything a run needs before its weights are read."""

    device: torch.device
    origin: BaseModelSource
    objective: Objective
    training_data: TrainingData
    plan: RunPlan


def prepare(
    config: TrainConfig, mesh: Mesh | None = None, *, flops_per_s: float | None = None
) -> Prepared:
    """Locates the model, reads the data and prints the plan.

    Args:
        config: the run's configuration.
        mesh: the ranks among which each step is divided; None in a single process.
        flops_per_s: the machine's matmul rate, for the plan; None measures it.

    Raises:
        ConfigError, DataError, SourceError, CheckpointError: the inputs are invalid.
    """
    device = pick_device(config.device) if mesh is None else mesh.device
    check_paged(config, device)
    origin = find_base_model(config)
    objective = build_objective(config.objective)
    if objective.reference_source is not None:
        check_reference(origin, objective.reference_source)
    model = planned_model(config, origin, objective)
    context = model.max_seq_len - virtual_tokens(model, config.adapter)
    # both are small, so their mistakes are told before the training data is prepared
    check_samples(config.samples, origin.tokenizer, context=context)
    kept = retention_samples(config, origin.tokenizer) if config.retention else ()
    training_data = load_training_data(config, origin.tokenizer, objective, context=context)
    if mesh is not None:
        share_data(training_data, config, mesh, objective)
    training_data = replace(training_data, retention=kept)
    total_steps = count_steps(config, training_data)
    if config.adapter is not None:
        config.adapter.check_steps(total_steps)
    plan = preflight(
        planned(config, objective),
        model,
        objective,
        training_data,
        total_steps,
        device,
        flops_per_s,
        origin.file_bytes,
    )
    return Prepared(device, origin, objective, training_data, plan)


def check_output(output: Path, config: TrainConfig, *, ignore: Collection[str] = ()) -> None:
    """Checks that the run can be started or resumed in `output`.

    Raises:
        OutputError: the folder contains another run, or this run is finished, or the folder cannot
            be written.
    """
    check_run_folder(output, config, ignore=ignore)
    _check_unfinished(output)


def _check_unfinished(output: Path) -> None:
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


def build_run(
    config: TrainConfig,
    output: Path,
    ready: Prepared,
    trained: Trained,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Returns a run that has taken no step yet, and seeds PyTorch's global random numbers."""
    parallel = trained.parallel
    # ranks with other data draw other dropout masks
    torch.manual_seed(config.seed + (0 if parallel is None else parallel.mesh.data.rank))
    ready.objective.start(
        RunSetup(
            model=trained.model,
            tokenizer=ready.origin.tokenizer,
            optimizer=config.optimizer,
            clip_norm=config.clip_norm,
            drops=config.dropout > 0 or getattr(config.adapter, "dropout", 0.0) > 0,
            seed=config.seed,
        )
    )
    return Run(
        config=config,
        output=output,
        source=ready.origin,
        model=trained.model,
        adapters=trained.adapters,
        optimizer=trained.optimizer,
        objective=ready.objective,
        data=ready.training_data,
        precision=build_precision_policy(config, trained.model.config, trained.model.device),
        plan=ready.plan,
        inputs=input_hashes(ready.origin),
        progress=TrainProgress(),
        callbacks=build_callbacks(
            config, callbacks, is_first=parallel is None or parallel.is_first
        ),
        flops=step_flops(trained.model.config, config),
        parallel=parallel,
    )


def _run(run: Run) -> TrainResult:
    """Resumes a run from its newest checkpoint, if there is one, and completes it."""
    resumed = _resume(run)
    if run.objective.caches_reference:
        cache_reference(run)
    with ExitStack() as closing, stop_on_signals() as stop:
        for callback in run.callbacks:
            closing.callback(callback.close, run)
            callback.on_start(run)
        if resumed:
            run.event("resumed", f"resumed at step {run.progress.step} of {run.total_steps}")
        start = time.monotonic()
        # otherwise the run was stopped early, but killed before it wrote its result
        if run.progress.stopped is None:
            with naming_late_ranks(run.parallel, config=run.config):
                run_steps(run, stop)
        _check_end(run, stop)
        run.finish_adapter()
        results = _results(run, time.monotonic() - start)
        for callback in run.callbacks:
            callback.on_end(run, results)
        if run.parallel is not None:
            run.parallel.restore_full(run.model, run.optimizer.final_parts())
        if run.is_first:
            _save_result(run)
            _write_manifest(run, results)
    if run.parallel is not None:
        run.parallel.barrier()
        leave()
    return TrainResult(run.output, results)


def _resume(run: Run) -> bool:
    """Restores the newest checkpoint; returns whether there was one."""
    resumed, messages = load_newest(run.output, run.state)
    for message in messages:
        console().print(message, soft_wrap=True)
    return resumed


def _check_end(run: Run, stop: StopRequest) -> None:
    """Checks that a run which takes no further step has a result.

    Raises:
        Interrupted: a signal stopped it before its last step.
        Diverged: a weight is NaN or infinite.
    """
    step = run.progress.step
    if run.progress.stopped is not None:
        run.event("stopped", run.progress.stopped)
    elif _is_signalled(run, stop) and step < run.total_steps:
        for callback in run.callbacks:
            callback.on_interrupt(run)
        again = "run the same command to resume"
        if run.config.backend == "deepspeed":
            again = "the same command starts anew, because this backend writes no checkpoints"
        raise Interrupted(
            f"interrupted after step {step} of {run.total_steps}; {again}",
            stop.signal or signal.SIGTERM,
        )
    if not run.is_finite():
        raise Diverged(
            f"a weight is NaN or infinite after step {step}; lower the learning rate (the last "
            "good checkpoint is kept)"
        )


def _is_signalled(run: Run, stop: StopRequest) -> bool:
    """Whether a signal has reached this process or, in a divided run, any rank."""
    signalled = stop.signal is not None
    return signalled if run.parallel is None else run.parallel.any(signalled)


def _check_implemented(config: TrainConfig, callbacks: Sequence[Callback]) -> None:
    """Checks that no key of the recipe is ignored because its callback is missing."""
    if config.tensorboard and not any("tensorboard" in each.implements for each in callbacks):
        raise ConfigError(
            "tensorboard=true needs a callback that writes the files, but none was given; call "
            "train with callbacks=easyllm.reporting.reporting_callbacks(config), or remove "
            "tensorboard"
        )


def _resumable_changes(config: TrainConfig) -> frozenset[str]:
    """Returns the `RESUMABLE_CHANGES` keys, without `eval_every` if evaluations affect results."""
    decides = config.early_stopping is not None or config.keep_best
    return RESUMABLE_CHANGES - {"eval_every"} if decides else RESUMABLE_CHANGES


def _results(run: Run, seconds: float) -> JsonObject:
    """Returns the results of a run before its final evaluation."""
    progress, device = run.progress, run.model.device
    results = {
        "steps": progress.step,
        "tokens": progress.tokens,
        "trained_tokens": progress.trained_tokens,
        "skipped_steps": progress.skipped,
        "trained_parameters": run.plan.trained_parameters,
        **run.plan.predictions(),
        "seconds": round(seconds, 2),
        "data": run.data.figures,
        "peak_rss_bytes": peak_rss_bytes(),
    }
    if run.config.backend == "torch":  # DeepSpeed's tensors are its own
        results["measured_bytes"] = measured_bytes(run.model, run.optimizer)
    if device.type != "cpu":
        results["peak_device_bytes"] = peak_memory_bytes(device)
    return results


def _write_manifest(run: Run, results: JsonObject) -> None:
    manifest = Manifest.create(
        "train",
        config=run.config.model_dump(mode="json"),
        inputs={**run.inputs, **run.data.inputs},
        results=results,
    )
    write_atomic(run.output / MANIFEST_FILE, manifest.model_dump_json(indent=2) + "\n")


def _save_result(run: Run) -> None:
    """Saves the trained adapter, or the model."""
    model, output, tokenizer = run.model, run.output, run.source.tokenizer
    if run.parallel is None:
        set_full_parameters(model, run.optimizer.final_state())
    ends = end_ids(run.config, tokenizer)
    if run.adapters is None:
        save_model(model, output / MODEL, tokenizer=tokenizer, end_ids=ends, replace=True)
    else:
        save_trained_adapter(model, run.config, output / ADAPTER, ends, replace=True)
