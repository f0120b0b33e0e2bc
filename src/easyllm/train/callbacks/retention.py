"""Measures what a fine-tune forgets: the loss on a retention set before and after training."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from easyllm.batches.packing import split_by_tokens
from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonObject
from easyllm.corpus.document import Document
from easyllm.corpus.files.paths import plain_suffix
from easyllm.corpus.sources import SourceConfig, list_splits, read_split
from easyllm.examples.conversations import detect_format
from easyllm.examples.data_file import read_rows
from easyllm.examples.sample import AnySample, Sample
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.train.config import TrainConfig
from easyllm.train.data_config import DataConfig
from easyllm.train.objectives import LanguageModelConfig, build_objective, objective_kind
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
        samples += _samples_of(file, tokenizer, config.data.max_seq_len)
    if not samples:
        raise ConfigError(
            f"the retention set ({', '.join(config.retention)}) has no text of two tokens; "
            "add texts, or remove retention"
        )
    return samples


def _samples_of(file: str, tokenizer: Tokenizer, max_seq_len: int) -> Sequence[AnySample]:
    """Returns the samples of a file of conversations, or the windows of the texts of any other."""
    if plain_suffix(file) in (".json", ".jsonl"):
        first = next(read_rows(Path(file)))
        if "text" not in first.values or detect_format(first.values) is not None:
            data = DataConfig(train=(file,), train_on="all", max_seq_len=max_seq_len)
            objective = build_objective(LanguageModelConfig())
            return objective.prepare(data, [Path(file)], tokenizer)[0]
    source = SourceConfig(paths=(file,), on_error="stop")
    texts = (
        item.text
        for split in list_splits("retention", source)
        for item in read_split(split, source)
        if isinstance(item, Document)
    )
    return [sample for text in texts for sample in _windows(tokenizer.encode(text), max_seq_len)]


def _windows(ids: list[int], length: int) -> Iterator[Sample]:
    """Yields a text in windows of `length` tokens, each predicting the token after each of its."""
    for start in range(0, len(ids) - 1, length):
        yield Sample.from_mask(ids[start : start + length + 1])


__all__ = ["Retention", "retention_samples"]
