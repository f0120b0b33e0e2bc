"""The values of a training run, and the interface of what is called while it runs.

A callback overrides the hooks it needs:

    class StopAtLoss(Callback):
        def after_step(self, run, report):
            if report.loss_nats < 1.0:
                run.progress.stopped = "the loss is below 1"

    train(config, Path("runs/mine"), callbacks=[StopAtLoss()])

Order of the hooks in a run:

    on_start → (after_backward → [on_event] → after_step → [on_evaluate])* → on_end → close
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import starmap
from pathlib import Path
from typing import ClassVar

from easyllm.adapters import AdapterSet, StepInfo
from easyllm.core.device import peak_memory_bytes
from easyllm.core.json_types import JsonObject
from easyllm.nn.config import ModelConfig
from easyllm.nn.decoder import Decoder
from easyllm.parallel.parallel import Parallel
from easyllm.plan.compute import training_flops
from easyllm.train.config import TrainConfig
from easyllm.train.factories import BaseModelSource
from easyllm.train.objectives import Objective
from easyllm.train.optim import MasterOptimizer
from easyllm.train.precision import PrecisionPolicy
from easyllm.train.preflight import RunPlan
from easyllm.train.progress import TrainProgress
from easyllm.train.state import RunState
from easyllm.train.training_data import TrainingData

OWN_NAMES = ("rl/", "rewards/")
"""Prefixes of metrics that are logged as they are; the others become `train/NAME`."""


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
        prefixes: how many of them an encoder reads; None for a decoder.
        shared: lengths of prompts that were computed for another sequence and not again.
        metrics: further metrics of the objective, by name.
        skipped: whether no parameter changed, because the loss or a gradient was not finite.
        gradient_scale: the factor from `parameter.grad` to the true gradient in this step.
    """

    step: int
    loss_nats: float
    learning_rate: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    seconds: float
    lengths: tuple[int, ...]
    prefixes: tuple[int, ...] | None = None
    shared: tuple[int, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    skipped: bool = False
    gradient_scale: float = 1.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of the step."""
        return self.tokens / self.seconds

    def figures(self) -> dict[str, float]:
        """Returns the metrics by the names that they have in `metrics.jsonl`."""
        return {
            "step": self.step,
            "train/loss_nats": self.loss_nats,
            "train/learning_rate": self.learning_rate,
            "train/grad_norm": self.grad_norm,
            "train/tokens": self.tokens,
            "train/trained_tokens": self.trained_tokens,
            "speed/tokens_per_s": self.tokens_per_s,
            **{_logged_name(name): value for name, value in self.metrics.items()},
        }


def _logged_name(name: str) -> str:
    """Returns the name of an objective's metric in `metrics.jsonl`."""
    return name if name.startswith(OWN_NAMES) else f"train/{name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A training run: its configuration and the objects that it trains with.

    Attributes:
        config: the configuration.
        output: the run's folder.
        source: where the initial weights and the tokenizer come from.
        model: the model.
        adapters: the adapter being trained; None if all weights are trained.
        optimizer: updates the trainable parameters.
        objective: the loss.
        data: the training and evaluation data.
        precision: the numerics of a step.
        plan: the number of steps, and the machine's matmul rate.
        inputs: hashes of the initial weights and the tokenizer.
        progress: counters and evaluations since the first step; the only value that changes.
        callbacks: called in this order.
        flops: returns the model FLOPs of a step.
        parallel: the ranks that the run is divided among; None in a single process.
    """

    config: TrainConfig
    output: Path
    source: BaseModelSource
    model: Decoder
    adapters: AdapterSet | None
    optimizer: MasterOptimizer
    objective: Objective
    data: TrainingData
    precision: PrecisionPolicy
    plan: RunPlan
    inputs: Mapping[str, str]
    progress: TrainProgress
    callbacks: "tuple[Callback, ...]"
    flops: Callable[[StepReport], float]
    parallel: Parallel | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run's results: rank 0, or the only one."""
        return self.parallel is None or self.parallel.is_first

    def is_finite(self) -> bool:
        """Returns whether all master weights are finite, on every rank."""
        finite = self.optimizer.is_finite()
        return finite if self.parallel is None else not self.parallel.any(not finite)

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps of the complete run."""
        return self.plan.steps

    @property
    def state(self) -> RunState:
        """The objects that a checkpoint stores and restores."""
        return RunState(
            optimizer=self.optimizer,
            loader=self.data.loader,
            progress=self.progress,
            identity={**self.inputs, "data": self.data.identity},
            adapters=self.adapters,
            scaler=self.precision.scaler,
            objective=self.objective,
            parallel=self.parallel,
        )

    def event(self, kind: str, detail: str) -> None:
        """Reports something unusual in the current step to all callbacks."""
        for callback in self.callbacks:
            callback.on_event(self, kind, detail)

    def finish_adapter(self) -> None:
        """Completes the adapter before its values are evaluated and saved as the result."""
        if self.adapters is not None and self.adapters.finish():
            self.event("pruned", "the adapter is pruned to its final budget before it is saved")

    def is_due(self, every: int) -> bool:
        """Returns whether something happens after the current step that happens every N steps."""
        return every > 0 and self.progress.step % every == 0

    @property
    def is_logged(self) -> bool:
        """Whether the metrics of the current step are logged."""
        return self.is_due(self.config.log_every) or self.progress.step == self.total_steps

    def figures(self, report: StepReport) -> dict[str, float]:
        """Returns the metrics of the current step to log, with MFU and memory."""
        figures = report.figures()
        if self.plan.flops_per_s:
            done = self.flops(report)
            figures["speed/mfu"] = done / report.seconds / self.plan.flops_per_s
        figures["memory/peak_bytes"] = peak_memory_bytes(self.optimizer.device)
        return figures

    def evaluate(self) -> dict[str, float]:
        """Returns the metrics of the current weights; empty without evaluation data."""
        if self.data.evaluate is None:
            return {}
        work = partial(self.data.evaluate, self.model, self.objective)
        return work() if self.parallel is None else self.parallel.forward(work)


class Callback:
    """What a training run calls while it runs; no hook does anything unless it is overridden.

    A hook is given the run instead of storing it, so that a callback does not prolong its life.

    Attributes:
        implements: keys of the recipe that have an effect only with this callback.
    """

    implements: ClassVar[tuple[str, ...]] = ()

    def on_start(self, run: Run) -> None:
        """Called before the first step, or after a checkpoint has been restored."""

    def after_backward(self, run: Run, info: StepInfo) -> None:
        """Called before the optimizer step, once all gradients are accumulated and finite."""

    def after_step(self, run: Run, report: StepReport) -> None:
        """Called after each step, skipped ones included; may set `run.progress.stopped`."""

    def on_evaluate(self, run: Run, figures: Mapping[str, float]) -> None:
        """Called with the metrics of each evaluation of the current step; may stop the run."""

    def on_retention(self, run: Run, loss_nats: float) -> None:
        """Called with each loss on the retention set, in nats per token."""

    def on_samples(self, run: Run, samples: list[dict[str, str]]) -> None:
        """Called with sample completions of the current step, as dicts of `prompt` and `text`."""

    def on_event(self, run: Run, kind: str, detail: str) -> None:
        """Called when something unusual happens, such as a skipped step."""

    def on_interrupt(self, run: Run) -> None:
        """Called when a signal has stopped the run before its last step."""

    def on_end(self, run: Run, results: JsonObject) -> None:
        """Called after the last step, before the result is saved; may add to the results."""

    def close(self, run: Run) -> None:
        """Called last, also after an error; in reverse order of the callbacks."""


def step_flops(model: ModelConfig, config: TrainConfig) -> Callable[[StepReport], float]:
    """Returns a function that computes a step's model FLOPs from its sequence lengths.

    Model FLOPs exclude the recomputation of gradient checkpointing, and prompts that are computed
    once for several sequences count once.
    """

    @cache
    def row(length: int, prefix: int = 0) -> int:
        prefixes = (prefix,)
        return training_flops(model, (length,), adapter=config.adapter, prefixes=prefixes).model

    def done(report: StepReport) -> float:
        prefixes = report.prefixes or (0,) * len(report.lengths)
        whole = sum(starmap(row, zip(report.lengths, prefixes, strict=True)))
        return whole - sum(map(row, report.shared))

    return done
