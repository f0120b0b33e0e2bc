"""Samples from any file of text or conversations, for measuring and calibrating a model."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from easyllm.corpus.document import Document
from easyllm.corpus.files.paths import plain_suffix
from easyllm.corpus.sources import FIX, SourceConfig, list_splits, read_split
from easyllm.examples.conversations import detect_format
from easyllm.examples.data_file import read_rows
from easyllm.examples.sample import AnySample, Sample
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.train.data_config import DataConfig
from easyllm.train.objectives import LanguageModelConfig, build_objective


def samples_of_file(
    file: str,
    tokenizer: Tokenizer,
    max_seq_len: int,
    *,
    train_on: Literal["assistant", "all"] = "all",
) -> Sequence[AnySample]:
    """Returns the samples of a file of conversations, or the windows of the texts of any other.

    Args:
        file: JSON or JSONL with conversations or `text`, Markdown, Parquet, plain text ...
        tokenizer: the model's tokenizer, with its chat template for conversations.
        max_seq_len: tokens of a window, and at most of a conversation.
        train_on: which tokens of a conversation carry a loss; those of a text all do.

    Raises:
        DataError: the file cannot be read.
    """
    if plain_suffix(file) in (".json", ".jsonl"):
        first = next(read_rows(Path(file)))
        if "text" not in first.values or detect_format(first.values) is not None:
            data = DataConfig(train=(file,), train_on=train_on, max_seq_len=max_seq_len)
            objective = build_objective(LanguageModelConfig())
            return objective.prepare(data, [Path(file)], tokenizer)[0]
    source = SourceConfig(paths=(file,), on_error="stop")
    texts = (
        item.text
        for split in list_splits("text", source, remedy=FIX)
        for item in read_split(split, source, remedy=FIX)
        if isinstance(item, Document)
    )
    return [sample for text in texts for sample in _windows(tokenizer.encode(text), max_seq_len)]


def _windows(ids: list[int], length: int) -> Iterator[Sample]:
    """Yields a text in windows of `length` tokens, each predicting the token after each of its."""
    for start in range(0, len(ids) - 1, length):
        yield Sample.from_mask(ids[start : start + length + 1])


__all__ = ["samples_of_file"]
