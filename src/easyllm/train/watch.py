"""Watching a run: figures, evaluations, samples, checkpoints, early stopping, the report."""

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
from easyllm.train.material import Evaluation
from easyllm.train.metrics import MetricsLog
from easyllm.train.objectives import Objective
from easyllm.train.report import RunReport
from easyllm.train.state import BEST, FOLDER, RunState, save_state, save_step
from easyllm.train.tensorboard import TensorBoardWriter

REPORT_EVERY_S = 15.0
COMPILING, SETTLED = 5, 3
"""Steps of a compiled run in which something may still be compiled, and those behind them that show the usual time."""


class RunWatch:
    """Everything a run does beside its arithmetic.

    Args:
        run: the run's folder.
        state: what checkpoints hold.
        evaluate: figures of the evaluation data.
        samples: shows what the model writes; both None where there is nothing to do.
        flops: of a step, by the lengths of its sequences; peak: FLOP/s of the machine's products.
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
        self.evaluated: dict[str, float] = {}  # figures of the last evaluation
        self._seconds: list[float] | None = [] if config.compile else None

    def after_step(self, report: StepReport) -> str | None:
        """Logs a step; evaluates, samples and saves where it is time. A text ends the run."""
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
        """Writes a checkpoint of this step, unless there is one, or a weight has become no number: then the last good one
        stays."""
        step = self.state.totals.step
        if self._saved == step:
            return
        if not self.state.optimizer.is_finite():
            self.event(step, "not saved", "a weight is no number; the last good checkpoint stays")
            return
        self._note_scale()
        save_step(self.run, self.state, keep_last=self.config.keep_last)
        self._saved = step

    def look(self, step: int) -> str | None:
        """Evaluates and samples; a text where the loss has stopped falling. Of the step looked at last it is nothing new."""
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
        """Keeps the best evaluation in mind, and its checkpoint where that is asked for."""
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
        """Notes something unusual, for people too."""
        self.log.write(step=step, event=kind, detail=detail)
        console().print(f"step {step}: {kind}: {detail}", soft_wrap=True, markup=False)

    def _tell_compile_time(self, step: int, seconds: float) -> None:
        """Says, once the steps have settled, how much longer the first ones took."""
        assert self._seconds is not None, "asked of compiled runs only"
        self._seconds.append(seconds)
        if len(self._seconds) < COMPILING + SETTLED:
            return
        first, usual = self._seconds[:COMPILING], statistics.median(self._seconds[COMPILING:])
        extra = sum(first) - COMPILING * usual
        detail = f"the first {COMPILING} steps took {extra:.1f} s longer than the {usual:.2f} s a step behind them"
        self.event(step, "compiled", detail)
        self._seconds = None

    def close(self) -> None:
        """Ends the logs and writes the last report."""
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
    """The evaluation of this model; None where there is no data for one."""
    return None if evaluate is None else lambda: evaluate(model, objective)


def check_samples(config: SamplesConfig | None, tokenizer: Tokenizer, *, context: int) -> None:
    """Refuses a prompt that the model cannot go on from, before a step is run.

    Raises:
        ConfigError: it has no token, or leaves no room in the context.
    """
    for number, prompt in enumerate(config.prompts if config is not None else ()):
        length = len(tokenizer.encode(prompt))
        if not 0 < length < context:
            raise ConfigError(
                f"samples.prompts[{number}] has {length} tokens, expected 1 to {context - 1} (the model's context less "
                "one); change it"
            )


def samples_of(
    config: SamplesConfig | None, model: Decoder, tokenizer: Tokenizer
) -> Callable[[], list[dict[str, str]]] | None:
    """Generations of this model for each prompt, from a generator of their own."""
    if config is None:
        return None
    from easyllm.engine import LLM, SamplingParams

    longest = max(len(tokenizer.encode(prompt)) for prompt in config.prompts) + config.max_tokens
    longest += model.num_virtual_tokens
    llm = LLM(
        model=model,
        tokenizer=tokenizer,
        # memory belongs to training, and weights change between samples: nothing cached stays true
        num_pages=len(config.prompts) * -(-longest // 16),
        page_size=16,
        prefix_caching=False,
        compiled_step=False,  # it would move the weights the optimizer holds
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
    """Useful FLOPs of a step, by the lengths of its sequences."""

    @cache
    def row(length: int) -> int:
        return training_flops(model, (length,), adapter=config.adapter).model

    return lambda lengths: sum(row(length) for length in lengths)
