"""The training loop. It depends on batches, an objective and an optimizer, not on files or layers.

loss of a step = Σ token losses of all its micro-batches / labelled tokens of all its micro-batches
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from easyllm.adapters import AdapterSet, StepInfo
from easyllm.batches.packing import Batch
from easyllm.core.errors import EasyllmError
from easyllm.core.progress import Progress
from easyllm.nn.decoder import Decoder
from easyllm.parallel.parallel import Parallel
from easyllm.train.deepspeed_backend import EngineOptimizer
from easyllm.train.objectives import Objective
from easyllm.train.objectives.losses import LossOutput, MeanLoss
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
            signalled = stop.signal is not None
            if run.parallel is not None:  # ranks receive a signal at different steps
                signalled = run.parallel.any(signalled)
            if run.progress.stopped is not None or signalled:
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
    sizes = _step_sizes(run, batches)
    factor = rate_factor(config.schedule, progress.step, run.total_steps)
    loss, metrics = accumulate(
        run.model, run.objective, batches, precision, run.adapters, run.parallel
    )
    if run.parallel is not None:
        run.parallel.reduce(run.optimizer.set_gradient)
    metrics |= run.data.loader.figures
    info = StepInfo(
        step=progress.step, total_steps=run.total_steps, gradient_scale=1.0 / precision.scale
    )
    if isinstance(run.optimizer, EngineOptimizer):
        norm = _engine_step(run.optimizer, factor, loss, progress.step)
    else:
        before = partial(_after_backward, run, info, factor)
        norm = apply_gradients(
            run.optimizer, precision, factor, config.clip_norm, loss, before, run.parallel
        )
    progress.count(sum(sizes.lengths), sizes.trained_tokens)
    if precision.scaler is not None:
        metrics["loss_scale"] = precision.scaler.scale
    _note_outcome(run, loss, skipped=norm is None)
    return StepReport(
        step=progress.step,
        loss_nats=loss,
        learning_rate=config.optimizer.learning_rate * factor,
        grad_norm=math.nan if norm is None else norm,
        tokens=sum(sizes.lengths),
        trained_tokens=sizes.trained_tokens,
        seconds=time.perf_counter() - start,
        lengths=sizes.lengths,
        prefixes=sizes.prefixes,
        shared=sizes.shared,
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
    parallel: Parallel | None = None,
) -> tuple[float, dict[str, float]]:
    """Accumulates the gradients of a step's micro-batches, times the loss scale if there is one.

    If the adapter has an additional loss term, its gradient is accumulated once per step. If the
    run is divided among ranks, the loss is divided by the number of terms of all ranks, and
    micro-batches that only keep this rank in step with the others add nothing.

    Returns:
        The mean loss per labelled token, in nats (without auxiliary terms), and the objective's
        metrics, averaged over tokens.
    """
    how = precision or PrecisionPolicy()
    with objective.products():
        objective.begin_step(model, batches)
    terms = sum(objective.num_terms(batch) for batch in batches if not batch.is_filler)
    mean = MeanLoss(max(1, terms if parallel is None else parallel.sum(terms)))
    found: dict[str, float] = {}
    if parallel is not None:  # before the micro-batch that reduces; counts once over all ranks
        found = _backward_of_adapter(adapters, how.scale / parallel.mesh.data.size, parallel)
    for number, batch in enumerate(batches):
        if parallel is not None:
            parallel.begin_micro_batch(last=number == len(batches) - 1)
        work = partial(_loss, model, objective, batch, how)
        whole, output = work() if parallel is None else parallel.forward(work)
        weight = 0.0 if batch.is_filler else how.scale / mean.num_terms
        _backward(whole * weight, parallel)
        if not batch.is_filler:
            mean.add(output)
        if parallel is not None:
            parallel.end_micro_batch()
    if parallel is None:
        return mean.nats, mean.metrics | _backward_of_adapter(adapters, how.scale)
    total = MeanLoss(mean.num_terms)
    total.add_all(parallel.gather(mean))
    return total.nats, total.metrics | found


def _loss(
    model: Decoder, objective: Objective, batch: Batch, how: PrecisionPolicy
) -> tuple[Tensor, LossOutput]:
    """Returns the term of a micro-batch that has a gradient, and its parts."""
    with how.autocast(), objective.products():
        output = objective.loss(
            model, batch.padded_to_multiple(how.token_multiple).to(model.device)
        )
    whole = output.sum if output.auxiliary is None else output.sum + output.auxiliary
    return whole, output


def _backward(term: Tensor, parallel: Parallel | None) -> None:
    """Accumulates the gradient of a term of the loss (a scalar)."""
    if parallel is None:
        term.backward()
    else:
        parallel.backward(term)


def _backward_of_adapter(
    adapters: AdapterSet | None, scale: float, parallel: Parallel | None = None
) -> dict[str, float]:
    """Accumulates the gradient of the adapter's own loss term; returns the term as a metric."""
    term = None if adapters is None else adapters.loss()
    if term is None:
        return {}
    if parallel is not None:
        parallel.begin_micro_batch(last=False)
    _backward(term * scale, parallel)
    if parallel is not None:
        parallel.end_micro_batch()
    return {"adapter_loss_nats": float(term.detach())}


@dataclass(frozen=True, slots=True)
class _StepSizes:
    """The sequences of a step, over all ranks."""

    lengths: tuple[int, ...]
    prefixes: tuple[int, ...] | None
    shared: tuple[int, ...]
    trained_tokens: int


def _step_sizes(run: Run, batches: Sequence[Batch]) -> _StepSizes:
    real = [batch for batch in batches if not batch.is_filler]
    lengths = tuple(n for batch in real for n in batch.lengths)
    trained = sum(batch.num_trained for batch in real)
    prefixes, config = None, run.model.config
    if config.encoder is not None:
        prefixes = tuple(n for batch in real for n in batch.prefix_lengths(config))
    shared = run.objective.shared_lengths(run.model, real)
    own = _StepSizes(lengths, prefixes, shared, trained)
    if run.parallel is None:
        return own
    ranks: list[_StepSizes] = run.parallel.gather(own)
    return _StepSizes(
        tuple(n for rank in ranks for n in rank.lengths),
        None if prefixes is None else tuple(n for rank in ranks for n in rank.prefixes or ()),
        tuple(n for rank in ranks for n in rank.shared),
        sum(rank.trained_tokens for rank in ranks),
    )


def apply_gradients(
    optimizer: MasterOptimizer,
    precision: PrecisionPolicy,
    factor: float,
    clip_norm: float | None,
    loss: float,
    before: Callable[[], None] | None = None,
    parallel: Parallel | None = None,
) -> float | None:
    """Clips and applies the accumulated gradients.

    Args:
        optimizer: holds the accumulated gradients.
        precision: its loss scaler is updated.
        factor: the schedule's factor on the learning rates.
        clip_norm: maximum global gradient norm; None disables clipping.
        loss: the step's loss.
        before: called before clipping, once the gradients are known to be finite.
        parallel: the ranks of the run; the norm is that of the gradient over all of them.

    Returns:
        The gradient norm before clipping. None if the loss or the norm is NaN or infinite; the
        gradients are then discarded and no parameter changes.
    """
    scaler = precision.scaler
    norm = optimizer.grad_norm() if parallel is None else parallel.grad_norm(optimizer.grad_norm)
    norm /= precision.scale
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
    if parallel is not None:
        parallel.refresh()
    return norm


def _engine_step(optimizer: EngineOptimizer, factor: float, loss: float, step: int) -> float | None:
    """Lets DeepSpeed update the weights, and returns the gradient norm before clipping.

    Raises:
        Diverged: the loss or the norm is NaN or infinite.
    """
    norm = optimizer.take_step(factor) if math.isfinite(loss) else math.nan
    if not math.isfinite(norm):
        raise Diverged(
            f"the loss ({loss}) or its gradient is NaN or infinite after step {step}; lower the "
            "learning rate, or set backend=torch, which skips a few such steps"
        )
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
