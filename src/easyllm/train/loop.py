"""The training loop. It depends on batches, an objective and an optimizer, not on files or layers.

loss of a step = Σ token losses of all its micro-batches / labelled tokens of all its micro-batches
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from easyllm.adapters import AdapterSet, TrainProgress
from easyllm.batches.packing import Batch
from easyllm.core.errors import EasyllmError
from easyllm.core.progress import Progress
from easyllm.nn.decoder import Decoder
from easyllm.train.config import TrainConfig
from easyllm.train.loss_scaler import LossScaler
from easyllm.train.objectives import Objective
from easyllm.train.optim import MasterOptimizer
from easyllm.train.schedule import rate_factor
from easyllm.train.signals import StopRequest
from easyllm.train.state import Totals

MAX_SKIPPED_STEPS = 3
"""Number of consecutive steps with a NaN or infinite loss or gradient after which a run fails."""
SPIKE_MEMORY, SPIKE_AFTER = 0.98, 20
"""Decay per step of the running mean that losses are compared with to detect spikes, and the number
of steps before it is used."""


class Diverged(EasyllmError):
    """The loss, a gradient or a weight is NaN or infinite; the last good checkpoint stays."""

    exit_code = 1


class StepLoader(Protocol):
    """Yields the micro-batches of consecutive steps; `state` is its position, for checkpoints."""

    state: Any
    last: list[int]
    """Indices of the samples or rows in the most recent step."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps per epoch."""

    def next_step(self) -> list[Batch]:
        """Returns the micro-batches of the next step."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """The metrics of one optimizer step.

    Attributes:
        step: number of steps completed, this one included.
        loss_nats: mean loss over the step's labelled tokens, in nats.
        learning_rate: the optimizer's main learning rate in this step.
        grad_norm: global gradient norm before clipping; NaN if the step was skipped.
        tokens, trained_tokens: tokens of the step, and the labelled ones among them.
        seconds: wall-clock time of the step.
        lengths: lengths of the step's sequences, in tokens.
        metrics: further metrics of the objective, by name.
    """

    step: int
    loss_nats: float
    learning_rate: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    seconds: float
    lengths: tuple[int, ...]
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of the step."""
        return self.tokens / self.seconds

    def figures(self) -> dict[str, float]:
        """Returns the metrics as a line of `metrics.jsonl`."""
        return {
            "step": self.step,
            "train/loss_nats": self.loss_nats,
            "train/learning_rate": self.learning_rate,
            "train/grad_norm": self.grad_norm,
            "train/tokens": self.tokens,
            "train/trained_tokens": self.trained_tokens,
            "speed/tokens_per_s": self.tokens_per_s,
            **{f"train/{name}": value for name, value in self.metrics.items()},
        }


class Watch(Protocol):
    """Callbacks of the training loop: logging, evaluation, checkpoints."""

    def after_step(self, report: StepReport) -> str | None:
        """Called after each step; returns the reason to stop the run, or None to continue."""

    def event(self, step: int, kind: str, detail: str) -> None:
        """Called when something unusual happens, such as a skipped step."""


@dataclass(slots=True)
class PrecisionPolicy:
    """The numerics of a step.

    Attributes:
        autocast: context manager for the forward pass.
        scaler: the loss scaler, for fp16.
        token_multiple: micro-batches are padded to a multiple of this many tokens; padding tokens
            are excluded from the loss.
    """

    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    scaler: LossScaler | None = None
    token_multiple: int = 1

    @property
    def scale(self) -> float:
        """The current loss scale; 1 without a scaler."""
        return 1.0 if self.scaler is None else self.scaler.scale


def run_steps(
    model: Decoder,
    objective: Objective,
    optimizer: MasterOptimizer,
    loader: StepLoader,
    config: TrainConfig,
    *,
    precision: PrecisionPolicy,
    totals: Totals,
    total_steps: int,
    watch: Watch,
    stop: StopRequest,
    adapters: AdapterSet | None = None,
) -> str:
    """Runs the remaining steps of a run.

    Args:
        model: the model; in evaluation mode afterwards.
        objective: the loss.
        optimizer: updates the trainable parameters.
        loader: yields the micro-batches of each step.
        config: the run's configuration.
        arithmetic: autocast, loss scaling and padding.
        totals: the run's counters; updated in place.
        total_steps: number of steps of the complete run.
        watch: callbacks after each step and for unusual events.
        stop: set by a signal handler to request a stop after the current step.
        adapters: its hooks are called after each backward pass and after each optimizer step.

    Returns:
        Why it ended: `finished`, `interrupted`, or the reason returned by `watch.after_step`.

    Raises:
        Diverged: three consecutive steps were skipped because of a NaN or infinite loss or
            gradient.
    """
    model.train()
    reason = "finished"
    with Progress("training", total=total_steps, unit="step") as progress:
        progress.skip(totals.step)
        while totals.step < total_steps:
            start = time.perf_counter()
            batches = loader.next_step()
            factor = rate_factor(config.schedule, totals.step, total_steps)
            loss, metrics = accumulate(model, objective, batches, precision, adapters)
            here = TrainProgress(
                step=totals.step, total_steps=total_steps, gradient_scale=1.0 / precision.scale
            )
            looks = None if adapters is None else partial(adapters.after_backward, here)
            norm = take_step(optimizer, precision, factor, config.clip_norm, loss, looks)
            totals.count(batches)
            if adapters is not None and norm is not None:
                adapters.after_step(replace(here, step=totals.step))
            if precision.scaler is not None:
                metrics["loss_scale"] = precision.scaler.scale
            if norm is None:
                watch.event(totals.step, "skipped", f"loss {loss}; samples {loader.last[:64]}")
                totals.skipped += 1
                totals.skipped_in_a_row += 1
                overflow = precision.scaler is not None and math.isfinite(loss)
                if totals.skipped_in_a_row >= MAX_SKIPPED_STEPS and not overflow:
                    raise Diverged(_diverged(totals.step))
            else:
                totals.skipped_in_a_row = 0
                if is_spike(totals, loss, config.spike_factor):
                    usual = f"usually {totals.usual_loss_nats:.4f}"
                    detail = f"loss {loss:.4f}, {usual}; samples {loader.last[:64]}"
                    watch.event(totals.step, "spike", detail)
                note_loss(totals, loss)
            report = StepReport(
                step=totals.step,
                loss_nats=loss,
                learning_rate=config.optimizer.learning_rate * factor,
                grad_norm=math.nan if norm is None else norm,
                tokens=sum(batch.token_ids.numel() for batch in batches),
                trained_tokens=sum(batch.num_trained for batch in batches),
                seconds=time.perf_counter() - start,
                lengths=tuple(n for batch in batches for n in batch.lengths),
                metrics=metrics,
            )
            ended = watch.after_step(report)
            progress.advance(1, loss=loss, tokens=f"{report.tokens_per_s:.0f}/s")
            if ended is not None or stop.signal is not None:
                reason = ended or "interrupted"
                break
    model.eval()
    return reason


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
    num_tokens = max(1, sum(objective.num_terms(batch) for batch in batches))
    total, metrics = 0.0, dict[str, float]()
    for batch in batches:
        with how.autocast():
            output = objective.loss(
                model, batch.padded_to_multiple(how.token_multiple).to(model.device)
            )
        whole = output.sum if output.auxiliary is None else output.sum + output.auxiliary
        (whole * (how.scale / num_tokens)).backward()
        total += output.sum.item()
        for name, value in output.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + value * output.num_tokens / num_tokens
    term = None if adapters is None else adapters.loss()
    if term is not None:
        (term * how.scale).backward()
        metrics["adapter_loss_nats"] = float(term.detach())
    return total / num_tokens, metrics


def take_step(
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
        arithmetic: its loss scaler is updated.
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


def mean_loss(model: Decoder, objective: Objective, batches: Iterable[Batch]) -> float:
    """Returns the mean loss per labelled token over `batches`, in nats."""
    return objective.evaluate(model, batches)["loss_nats"]


def is_spike(totals: Totals, loss: float, factor: float) -> bool:
    """Returns whether `loss` exceeds `factor` times its running mean, after enough steps."""
    return totals.usual_steps >= SPIKE_AFTER and loss > factor * totals.usual_loss_nats


def note_loss(totals: Totals, loss: float) -> None:
    """Updates the exponential moving average of the loss."""
    totals.usual_steps += 1
    memory = min(SPIKE_MEMORY, 1 - 1 / totals.usual_steps)
    totals.usual_loss_nats = memory * totals.usual_loss_nats + (1 - memory) * loss


def _diverged(step: int) -> str:
    return (
        f"the loss or its gradient was NaN or infinite in {MAX_SKIPPED_STEPS} consecutive steps, "
        f"up to step {step}; lower the learning rate, or look at the samples named in "
        "metrics.jsonl (the last good checkpoint is kept)"
    )
