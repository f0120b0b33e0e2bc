"""The training loop: it knows batches, an objective and an optimizer, and nothing of models' parts or files.

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

MOST_SKIPPED = 3
"""Steps in a row whose loss or gradient is not a number, after which a run ends."""
SPIKE_MEMORY, SPIKE_AFTER = 0.98, 20
"""Of the running mean a loss is compared with: its memory a step, and the steps before it counts."""


class Diverged(EasyllmError):
    """The loss is no number, again and again; the last good checkpoint stays."""

    exit_code = 1


class StepLoader(Protocol):
    """Gives the micro-batches of one step after the other; its position is `state`."""

    state: Any
    last: list[int]
    """Numbers of the samples or rows of the step given last."""

    @property
    def steps_per_epoch(self) -> int: ...

    def next_step(self) -> list[Batch]: ...


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimizer step did; the loss is the mean over the step's labelled tokens, in nats."""

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
        return self.tokens / self.seconds

    def figures(self) -> dict[str, float]:
        """As a line of `metrics.jsonl`."""
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
    """Told of every step; whatever is not arithmetic happens there."""

    def after_step(self, report: StepReport) -> str | None:
        """Notes a step; a text ends the run for that reason."""

    def event(self, step: int, kind: str, detail: str) -> None:
        """Notes something unusual."""


@dataclass(slots=True)
class Arithmetic:
    """How a step computes.

    Attributes:
        autocast: around the forward pass.
        scaler: of the loss, for fp16.
        token_multiple: micro-batches are filled up to a multiple of so many tokens, which take part in no loss.
    """

    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    scaler: LossScaler | None = None
    token_multiple: int = 1

    @property
    def scale(self) -> float:
        return 1.0 if self.scaler is None else self.scaler.scale


def run_steps(
    model: Decoder,
    objective: Objective,
    optimizer: MasterOptimizer,
    loader: StepLoader,
    config: TrainConfig,
    *,
    arithmetic: Arithmetic,
    totals: Totals,
    total_steps: int,
    watch: Watch,
    stop: StopRequest,
    adapters: AdapterSet | None = None,
) -> str:
    """Runs the steps that are left; returns why it ended. `adapters` is told after each backward pass and each step.

    Raises:
        Diverged: three steps in a row were skipped because their loss or gradient is no number.
    """
    model.train()
    reason = "finished"
    with Progress("training", total=total_steps, unit="step") as progress:
        progress.skip(totals.step)
        while totals.step < total_steps:
            start = time.perf_counter()
            batches = loader.next_step()
            factor = rate_factor(config.schedule, totals.step, total_steps)
            loss, metrics = accumulate(model, objective, batches, arithmetic, adapters)
            here = TrainProgress(
                step=totals.step, total_steps=total_steps, gradient_scale=1.0 / arithmetic.scale
            )
            looks = None if adapters is None else partial(adapters.after_backward, here)
            norm = take_step(optimizer, arithmetic, factor, config.clip_norm, loss, looks)
            totals.count(batches)
            if adapters is not None and norm is not None:
                adapters.after_step(replace(here, step=totals.step))
            if arithmetic.scaler is not None:
                metrics["loss_scale"] = arithmetic.scaler.scale
            if norm is None:
                watch.event(totals.step, "skipped", f"loss {loss}; samples {loader.last[:64]}")
                totals.skipped += 1
                totals.skipped_in_a_row += 1
                overflow = arithmetic.scaler is not None and math.isfinite(loss)
                if totals.skipped_in_a_row >= MOST_SKIPPED and not overflow:
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
    arithmetic: Arithmetic | None = None,
    adapters: AdapterSet | None = None,
) -> tuple[float, dict[str, float]]:
    """Adds the gradients of a step's micro-batches (times the loss scale, where there is one), and of the term that an
    adapter adds to a step's loss.

    Returns:
        The mean loss a labelled token, in nats (auxiliary terms apart), and the objective's figures, averaged by tokens.
    """
    how = arithmetic or Arithmetic()
    num_tokens = max(1, sum(objective.num_terms(batch) for batch in batches))
    total, metrics = 0.0, dict[str, float]()
    for batch in batches:
        with how.autocast():
            output = objective.loss(model, batch.filled(how.token_multiple).to(model.device))
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
    arithmetic: Arithmetic,
    factor: float,
    clip_norm: float | None,
    loss: float,
    before: Callable[[], None] | None = None,
) -> float | None:
    """Clips and applies the gradients; returns their norm before clipping. `before` is called when they are known to be
    finite.

    None where the loss or the norm is no number: nothing is applied, the gradients are dropped.
    """
    scaler = arithmetic.scaler
    norm = optimizer.grad_norm() / arithmetic.scale
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
    """Mean loss a labelled token over `batches`, in nats."""
    return objective.evaluate(model, batches)["loss_nats"]


def is_spike(totals: Totals, loss: float, factor: float) -> bool:
    """Whether `loss` is above `factor` times the usual, once there are enough steps to know that."""
    return totals.usual_steps >= SPIKE_AFTER and loss > factor * totals.usual_loss_nats


def note_loss(totals: Totals, loss: float) -> None:
    """Takes a step's loss into the exponential mean."""
    totals.usual_steps += 1
    memory = min(SPIKE_MEMORY, 1 - 1 / totals.usual_steps)
    totals.usual_loss_nats = memory * totals.usual_loss_nats + (1 - memory) * loss


def _diverged(step: int) -> str:
    return (
        f"the loss or its gradient was no number {MOST_SKIPPED} steps in a row, up to step {step}; lower the learning "
        "rate, or look at the samples named in metrics.jsonl (the last good checkpoint is kept)"
    )
