"""Bookkeeping of a run: metrics, evaluations, samples, checkpoints, early stopping, the report."""

import math
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from easyllm.core.device import peak_memory_bytes
from easyllm.core.errors import ConfigError
from easyllm.core.progress import console
from easyllm.nn.config import ModelConfig
from easyllm.nn.decoder import Decoder
from easyllm.plan.compute import training_flops
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.train.config import SamplesConfig, TrainConfig
from easyllm.train.loop import StepReport
from easyllm.train.loss_scaler import LossScaler
from easyllm.train.metrics import MetricsLog
from easyllm.train.objectives import Objective
from easyllm.train.report import RunReport
from easyllm.train.state import BEST, FOLDER, RunState, save_state, save_step
from easyllm.train.tensorboard import TensorBoardWriter
from easyllm.train.training_data import Evaluation

REPORT_EVERY_S = 15.0
COMPILING, SETTLED = 5, 3
"""Number of first steps in which `torch.compile` may still compile, and of the steps after them
that measure the usual step time."""


class RunWatch:
    """Logging, evaluation, sampling and checkpointing of a run.

    Args:
        run: the run's folder.
        config: the run's configuration.
        state: the state that checkpoints store.
        evaluate: returns the metrics of the evaluation data; None if there is none.
        samples: returns sample completions of the model; None if none are configured.
        scaler: the loss scaler, for fp16.
        flops: returns the FLOPs of a step, given the lengths of its sequences.
        peak: the machine's matmul rate in FLOP/s, for the MFU; None if unknown.
        total_steps: number of steps of the run.
    """

    def __init__(
        self,
        run: Path,
        config: TrainConfig,
        state: RunState,
        *,
        evaluate: Callable[[], dict[str, float]] | None,
        samples: Callable[[], list[dict[str, str]]] | None,
        scaler: LossScaler | None,
        flops: Callable[[tuple[int, ...]], float],
        peak: float | None,
        total_steps: int,
    ) -> None:
        self.run, self.config, self.state = run, config, state
        self.evaluate, self.samples, self.flops, self.peak = evaluate, samples, flops, peak
        self.total_steps, self.scaler = total_steps, scaler
        self.log = MetricsLog(run, after_step=state.totals.step)
        self.board = (
            TensorBoardWriter(run / "tensorboard", after_step=state.totals.step)
            if config.tensorboard
            else None
        )
        self.report = RunReport(run, total_steps=total_steps)
        self._reported = time.monotonic()
        self._saved = self._looked = -1  # the steps of the last checkpoint and the last evaluation
        self.evaluated: dict[str, float] = {}  # metrics of the last evaluation
        self._seconds: list[float] | None = [] if config.compile else None

    def after_step(self, report: StepReport) -> str | None:
        """Logs a step; evaluates, samples and saves a checkpoint when due.

        Returns:
            The reason to stop the run, or None to continue.
        """
        config, step = self.config, report.step
        last = step == self.total_steps
        if self._seconds is not None:
            self._tell_compile_time(step, report.seconds)
        if step % config.log_every == 0 or last:
            figures = report.figures()
            if self.peak:
                figures["speed/mfu"] = self.flops(report.lengths) / report.seconds / self.peak
            figures["memory/peak_bytes"] = peak_memory_bytes(self.state.optimizer.device)
            self._write(figures)
        reason = None
        if config.eval_every and step % config.eval_every == 0 and not last:
            reason = self.look(step)
        if reason is not None:
            self.state.extra["stopped"] = reason
        if config.save_every and (step % config.save_every == 0 or last or reason is not None):
            self.save()
        if time.monotonic() - self._reported > REPORT_EVERY_S:
            self.report.write()
            self._reported = time.monotonic()
        return reason

    def save(self) -> None:
        """Writes a checkpoint of this step, unless it exists or a weight is NaN or infinite.

        If a weight is not finite, the last good checkpoint stays.
        """
        step = self.state.totals.step
        if self._saved == step:
            return
        if not self.state.optimizer.is_finite():
            self.event(
                step, "not saved", "a weight is NaN or infinite; keeping the last good checkpoint"
            )
            return
        self._note_scale()
        save_step(self.run, self.state, keep_last=self.config.keep_last)
        self._saved = step

    def look(self, step: int) -> str | None:
        """Evaluates and samples; does nothing if this step was already evaluated.

        Returns:
            The reason to stop early, or None to continue.
        """
        if step == self._looked:
            return None
        self._looked = step
        if self.samples is not None:
            self.log.write(step=step, samples=self.samples())
        if self.evaluate is None:
            return None
        figures = self.evaluated = self.evaluate()
        self._write({"step": step, **figures})
        shown = ", ".join(f"{name.removeprefix('eval/')} {v:.4f}" for name, v in figures.items())
        console().print(f"step {step}: {shown}", soft_wrap=True)
        return self._judge(step, figures["eval/loss_nats"])

    def _judge(self, step: int, loss: float) -> str | None:
        """Tracks the best evaluation, saves its checkpoint with `keep_best`, and decides on early
        stopping; returns the reason to stop, or None."""
        extra, stopping = self.state.extra, self.config.early_stopping
        best = extra.get("best_loss_nats", math.inf)
        if loss < best:
            extra["best_loss_nats"], extra["best_step"] = loss, step
            if self.config.keep_best:
                self._note_scale()
                save_state(self.run / FOLDER / BEST, self.state)
        if stopping is None:
            return None
        if loss < extra.get("stopping_loss_nats", math.inf) - stopping.min_delta:
            extra["stopping_loss_nats"], extra["patience_used"] = loss, 0
            return None
        extra["patience_used"] = extra.get("patience_used", 0) + 1
        if extra["patience_used"] < stopping.patience:
            return None
        return f"the evaluation loss has not fallen for {stopping.patience} evaluations"

    def event(self, step: int, kind: str, detail: str) -> None:
        """Logs an unusual event to `metrics.jsonl` and to the console."""
        self.log.write(step=step, event=kind, detail=detail)
        console().print(f"step {step}: {kind}: {detail}", soft_wrap=True, markup=False)

    def _tell_compile_time(self, step: int, seconds: float) -> None:
        """Reports the extra time of the first steps, once the step time has settled."""
        assert self._seconds is not None, "called for compiled runs only"
        self._seconds.append(seconds)
        if len(self._seconds) < COMPILING + SETTLED:
            return
        first, usual = self._seconds[:COMPILING], statistics.median(self._seconds[COMPILING:])
        extra = sum(first) - COMPILING * usual
        detail = (
            f"in total, the first {COMPILING} steps took {extra:.1f} s longer than later steps, "
            f"which take {usual:.2f} s each"
        )
        self.event(step, "compiled", detail)
        self._seconds = None

    def close(self) -> None:
        """Closes the logs and writes the final report."""
        self.log.close()
        if self.board is not None:
            self.board.close()
        self.report.write()

    def _note_scale(self) -> None:
        if self.scaler is not None:
            self.state.extra["loss_scaler"] = self.scaler.state()

    def _write(self, figures: dict[str, float]) -> None:
        self.log.write(**figures)
        if self.board is not None:
            step = int(figures["step"])
            values = {name: value for name, value in figures.items() if name != "step"}
            self.board.write(step, time.time(), values)


def evaluation_of(
    evaluate: Evaluation | None, model: Decoder, objective: Objective
) -> Callable[[], dict[str, float]] | None:
    """Returns a function that evaluates this model; None if there is no evaluation data."""
    return None if evaluate is None else lambda: evaluate(model, objective)


def check_samples(config: SamplesConfig | None, tokenizer: Tokenizer, *, context: int) -> None:
    """Checks the sample prompts before the first step.

    Raises:
        ConfigError: a prompt has no tokens, or leaves no space for a completion in the context.
    """
    for number, prompt in enumerate(config.prompts if config is not None else ()):
        length = len(tokenizer.encode(prompt))
        if not 0 < length < context:
            raise ConfigError(
                f"samples.prompts[{number}] has {length} tokens, expected 1 to {context - 1} (the "
                "model's context minus one); change it"
            )


def samples_of(
    config: SamplesConfig | None, model: Decoder, tokenizer: Tokenizer
) -> Callable[[], list[dict[str, str]]] | None:
    """Returns a function that generates a completion for each prompt, with a separate RNG."""
    if config is None:
        return None
    from easyllm.engine import LLM, SamplingParams

    longest = max(len(tokenizer.encode(prompt)) for prompt in config.prompts) + config.max_tokens
    longest += model.num_virtual_tokens
    llm = LLM(
        model=model,
        tokenizer=tokenizer,
        # leave the memory to training; cached prefixes would be stale once the weights change
        num_pages=len(config.prompts) * -(-longest // 16),
        page_size=16,
        prefix_caching=False,
        compiled_step=False,  # would move the weights, which the optimizer references
    )
    params = SamplingParams(max_tokens=config.max_tokens, temperature=config.temperature, seed=0)

    def show() -> list[dict[str, str]]:
        training = model.training
        model.eval()
        done = llm.generate(list(config.prompts), params)
        model.train(training)
        return [
            {"prompt": prompt, "text": each.text}
            for prompt, each in zip(config.prompts, done, strict=True)
        ]

    return show


def step_flops(model: ModelConfig, config: TrainConfig) -> Callable[[tuple[int, ...]], float]:
    """Returns a function that computes a step's model FLOPs from its sequence lengths.

    Model FLOPs exclude the recomputation of gradient checkpointing.
    """

    @cache
    def row(length: int) -> int:
        return training_flops(model, (length,), adapter=config.adapter).model

    return lambda lengths: sum(row(length) for length in lengths)
