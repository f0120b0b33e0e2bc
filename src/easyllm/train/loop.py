"""The training loop. It depends on batches, an objective and an optimizer, not on files or layers.

loss of a step = Σ token losses of all its micro-batches / labelled tokens of all its micro-batches
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial

from easyllm.adapters import AdapterSet, StepInfo
from easyllm.batches.packing import Batch
from easyllm.core.errors import EasyllmError
from easyllm.core.progress import Progress
from easyllm.nn.decoder import Decoder
from easyllm.train.objectives import Objective
from easyllm.train.objectives.losses import MeanLoss
from easyllm.train.optim import MasterOptimizer
from easyllm.train.precision import PrecisionPolicy
from easyllm.train.schedule import rate_factor
from easyllm.train.signals import StopRequest
from easyllm.train.training_run import Run, StepReport

MAX_SKIPPED_STEPS = 3
"""Number of consecutive steps with a NaN or infinite loss or gradient after which a run fails."""


class Diverged(EasyllmError):
    """The loss, a gradient or a weight is NaN or infinite; the last good checkpoint stays."""

    exit_code = 1


def run_steps(run: Run, stop: StopRequest) -> None:
    """Runs the remaining steps of a run; its model is in evaluation mode afterwards.

    The loop ends after the last step, when a callback has set `run.progress.stopped`, or on a
    request to stop.

    Args:
        run: the run; its progress is updated in place.
        stop: set by a signal handler to request a stop after the current step.

    Raises:
        Diverged: three consecutive steps were skipped because of a NaN or infinite loss or
            gradient.
    """
    run.model.train()
    with Progress("training", total=run.total_steps, unit="step") as progress:
        progress.skip(run.progress.step)
        while run.progress.step < run.total_steps:
            report = take_step(run)
            for callback in run.callbacks:
                callback.after_step(run, report)
            progress.advance(1, loss=report.loss_nats, tokens=f"{report.tokens_per_s:.0f}/s")
            if run.progress.stopped is not None or stop.signal is not None:
                break
    run.model.eval()


def take_step(run: Run) -> StepReport:
    """Takes one optimizer step: forward and backward of its micro-batches, clipping, update.

    Raises:
        Diverged: it is the third consecutive step with a NaN or infinite loss or gradient.
    """
    start = time.perf_counter()
    config, progress, precision = run.config, run.progress, run.precision
    batches = run.data.loader.next_step()
    factor = rate_factor(config.schedule, progress.step, run.total_steps)
    loss, metrics = accumulate(run.model, run.objective, batches, precision, run.adapters)
    metrics |= run.data.loader.figures
    info = StepInfo(
        step=progress.step, total_steps=run.total_steps, gradient_scale=1.0 / precision.scale
    )
    before = partial(_after_backward, run, info, factor)
    norm = apply_gradients(run.optimizer, precision, factor, config.clip_norm, loss, before)
    progress.count(batches)
    if precision.scaler is not None:
        metrics["loss_scale"] = precision.scaler.scale
    _note_outcome(run, loss, skipped=norm is None)
    return StepReport(
        step=progress.step,
        loss_nats=loss,
        learning_rate=config.optimizer.learning_rate * factor,
        grad_norm=math.nan if norm is None else norm,
        tokens=sum(batch.token_ids.numel() for batch in batches),
        trained_tokens=sum(batch.num_trained for batch in batches),
        seconds=time.perf_counter() - start,
        lengths=tuple(n for batch in batches for n in batch.lengths),
        metrics=metrics,
        skipped=norm is None,
        gradient_scale=info.gradient_scale,
    )


def accumulate(
    model: Decoder,
    objective: Objective,
    batches: Sequence[Batch],
    precision: PrecisionPolicy | None = None,
    adapters: AdapterSet | None = None,
) -> tuple[float, dict[str, float]]:
    """Accumulates the gradients of a step's micro-batches, times the loss scale if there is one.

    If the adapter has an additional loss term, its gradient is accumulated once per step.

    Returns:
        The mean loss per labelled token, in nats (without auxiliary terms), and the objective's
        metrics, averaged over tokens.
    """
    how = precision or PrecisionPolicy()
    with objective.products():
        objective.begin_step(model, batches)
    mean = MeanLoss(max(1, sum(objective.num_terms(batch) for batch in batches)))
    for batch in batches:
        with how.autocast(), objective.products():
            output = objective.loss(
                model, batch.padded_to_multiple(how.token_multiple).to(model.device)
            )
        whole = output.sum if output.auxiliary is None else output.sum + output.auxiliary
        (whole * (how.scale / mean.num_terms)).backward()
        mean.add(output)
    metrics = mean.metrics
    term = None if adapters is None else adapters.loss()
    if term is not None:
        (term * how.scale).backward()
        metrics["adapter_loss_nats"] = float(term.detach())
    return mean.nats, metrics


def apply_gradients(
    optimizer: MasterOptimizer,
    precision: PrecisionPolicy,
    factor: float,
    clip_norm: float | None,
    loss: float,
    before: Callable[[], None] | None = None,
) -> float | None:
    """Clips and applies the accumulated gradients.

    Args:
        optimizer: holds the accumulated gradients.
        precision: its loss scaler is updated.
        factor: the schedule's factor on the learning rates.
        clip_norm: maximum global gradient norm; None disables clipping.
        loss: the step's loss.
        before: called before clipping, once the gradients are known to be finite.

    Returns:
        The gradient norm before clipping. None if the loss or the norm is NaN or infinite; the
        gradients are then discarded and no parameter changes.
    """
    scaler = precision.scaler
    norm = optimizer.grad_norm() / precision.scale
    is_bad = not (math.isfinite(norm) and math.isfinite(loss))
    if scaler is not None:
        optimizer.scale_gradients(1.0 / scaler.scale)
        scaler.update(is_bad)
    if is_bad:
        optimizer.clear()
        return None
    if before is not None:
        before()
    if clip_norm is not None:
        optimizer.clip(norm, clip_norm)
    optimizer.step(factor)
    return norm


def _after_backward(run: Run, info: StepInfo, rate_factor: float) -> None:
    run.objective.after_backward(info.gradient_scale, rate_factor)
    for callback in run.callbacks:
        callback.after_backward(run, info)


def _note_outcome(run: Run, loss: float, *, skipped: bool) -> None:
    """Counts a skipped step, or updates the usual loss; reports skipped steps and spikes."""
    progress, samples = run.progress, run.data.loader.last[:64]
    if not skipped:
        progress.skipped_in_a_row = 0
        steady = run.objective.loss_is_steady
        if steady and progress.is_spike(loss, run.config.spike_factor):
            usual = f"usually {progress.usual_loss_nats:.4f}"
            run.event("spike", f"loss {loss:.4f}, {usual}; samples {samples}")
        progress.note_loss(loss)
        return
    run.event("skipped", f"loss {loss}; samples {samples}")
    progress.skipped += 1
    progress.skipped_in_a_row += 1
    overflow = run.precision.scaler is not None and math.isfinite(loss)
    if progress.skipped_in_a_row >= MAX_SKIPPED_STEPS and not overflow:
        raise Diverged(
            f"the loss or its gradient was NaN or infinite in {MAX_SKIPPED_STEPS} consecutive "
            f"steps, up to step {progress.step}; lower the learning rate, or look at the samples "
            "named in metrics.jsonl (the last good checkpoint is kept)"
        )
