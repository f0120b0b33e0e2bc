"""Prepares rows of text and label for training a classification or regression head.

The head predicts the label from the last token of the text. A label is a class number, counted
from 0, or a regression target. Class names are rejected with a hint to map them to numbers.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from easyllm.core.errors import DataError
from easyllm.examples.data_file import Row, read_rows
from easyllm.examples.prepare import PreparationStats
from easyllm.examples.sample import Sample
from easyllm.ops.cross_entropy import IGNORE_INDEX
from easyllm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from easyllm.core.json_types import Json

TARGET = "target"
"""Name of the extra of a sample that stores its regression target."""


def prepare_labelled_texts(
    files: Iterable[Path],
    tokenizer: Tokenizer,
    *,
    text_key: str,
    label_key: str,
    num_labels: int,
    max_seq_len: int,
) -> tuple[list[Sample], PreparationStats]:
    """Prepares samples whose last token carries the label.

    Texts longer than `max_seq_len` are truncated at the beginning, so that their last token stays.

    Args:
        text_key: key of the text in a row.
        label_key: key of the label in a row.
        num_labels: number of classes; 1 for regression.
        max_seq_len: maximum number of token ids in a sample.

    Raises:
        DataError: a row has no text, no label, or a label out of range (the message gives its
            location), or there are no rows to train on.
    """
    samples, account = [], PreparationStats()
    for file in files:
        for row in read_rows(file):
            account.rows += 1
            text, label = _text(row, text_key), _label(row, label_key, num_labels)
            ids = tokenizer.encode(text)
            if not ids:
                account.dropped_untrained += 1
                continue
            account.cut += len(ids) > max_seq_len
            ids = ids[-max_seq_len:]
            extras = {TARGET: float(label)} if num_labels == 1 else {}
            location = 0 if num_labels == 1 else int(label)
            samples.append(
                Sample(tuple(ids), (IGNORE_INDEX,) * (len(ids) - 1) + (location,), extras)
            )
            account.samples += 1
            account.tokens += len(ids)
            account.trained_tokens += 1
    if not samples:
        raise DataError(f"no trainable rows remain ({account.summary()}); check the data files")
    return samples, account


def _text(row: Row, key: str) -> str:
    value = row.values.get(key)
    if not isinstance(value, str):
        raise DataError(
            f"{row.location} has no text under {key!r} (keys: {', '.join(sorted(row.values))}); "
            "set data.text_key"
        )
    return value


def _label(row: Row, key: str, num_labels: int) -> int | float:
    value: Json = row.values.get(key)
    if isinstance(value, str):
        expected = "a number" if num_labels == 1 else f"a class number from 0 to {num_labels - 1}"
        raise DataError(
            f"{row.location} has label {value!r} under {key!r}, expected {expected}; "
            "replace names by numbers, or set data.label_key"
        )
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(
            f"{row.location} has label {value!r} under {key!r}, expected a number; "
            "set data.label_key"
        )
    if num_labels == 1:
        if not math.isfinite(value):
            raise DataError(f"{row.location} has label {value}, expected a finite number")
        return float(value)
    if not isinstance(value, int) or not 0 <= value < num_labels:
        raise DataError(
            f"{row.location} has label {value!r}, expected a class from 0 to {num_labels - 1}; "
            "set objective.num_labels"
        )
    return value
