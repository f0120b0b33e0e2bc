"""Measures what a fine-tune forgets: the loss on a retention set before and after training."""

from collections.abc import Sequence

from easyllm.batches.packing import split_by_tokens
from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonObject
from easyllm.examples.sample import AnySample
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.train.config import TrainConfig
from easyllm.train.objectives import LanguageModelConfig, build_objective, objective_kind
from easyllm.train.text_samples import samples_of_file
from easyllm.train.training_run import Callback, Run, StepReport


class Retention(Callback):
    """Evaluates the retention set before the first step, with each evaluation and at the end.

    The loss is the mean cross-entropy over all tokens of the set, whatever the run's objective.
    """

    def __init__(self) -> None:
        self._objective = build_objective(LanguageModelConfig())
        self._measured_step = -1
        self._loss_nats = 0.0

    def on_start(self, run: Run) -> None:
        """Measures the loss before training, in a new run."""
        if run.progress.step == 0:
            run.progress.retention_before = self._measure(run)

    def after_step(self, run: Run, report: StepReport) -> None:
        """Measures if an evaluation is due; the last step is measured in `on_end`."""
        if run.is_due(run.config.eval_every) and report.step != run.total_steps:
            self._measure(run)

    def on_end(self, run: Run, results: JsonObject) -> None:
        """Adds the loss before and after training to the results."""
        if run.config.keep_best:
            self._measured_step = -1  # the best weights have been restored
        before, after = run.progress.retention_before, self._measure(run)
        results["retention_loss_nats"] = after
        if before is None:
            return
        results["retention_loss_nats_before"] = before
        run.event("retention", f"loss {before:.4f} before training, {after:.4f} after")

    def _measure(self, run: Run) -> float:
        """Returns the loss of the current step, and passes it to all callbacks if it is new."""
        if run.progress.step == self._measured_step:
            return self._loss_nats
        groups = split_by_tokens(run.data.retention, run.config.micro_batch_tokens)
        batches = (self._objective.collate(group) for group in groups)
        self._measured_step = run.progress.step
        self._loss_nats = self._objective.evaluate(run.model, batches)["loss_nats"]
        for callback in run.callbacks:
            callback.on_retention(run, self._loss_nats)
        return self._loss_nats


def retention_samples(config: TrainConfig, tokenizer: Tokenizer) -> Sequence[AnySample]:
    """Returns the samples of a run's retention set; all of their tokens carry a loss.

    Raises:
        ConfigError: the objective trains no language model, or no token is left to measure.
        DataError: a file cannot be read.
    """
    if not objective_kind(config.objective).generates:
        raise ConfigError(
            f"retention measures a language model, but a {config.objective.kind} has no head for "
            "tokens; remove retention"
        )
    samples = list[AnySample]()
    for file in config.retention:
        samples += samples_of_file(file, tokenizer, config.data.max_seq_len)
    if not samples:
        raise ConfigError(
            f"the retention set ({', '.join(config.retention)}) has no text of two tokens; "
            "add texts, or remove retention"
        )
    return samples


__all__ = ["Retention", "retention_samples"]
