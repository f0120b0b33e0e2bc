"""Rows of a text and a label, for a head of labels: the label stands at the text's last token.

A label is the number of a class, from 0, or a number to regress on. Classes by name are refused with how to number them.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from easyllm.core.errors import DataError
from easyllm.data.packing import Sample
from easyllm.data.prepare import Account
from easyllm.data.rows import Row, read_rows
from easyllm.ops.cross_entropy import IGNORE_INDEX
from easyllm.tokenizer.tokenizer import Tokenizer

TARGET = "target"
"""The extra of a sample that holds the number to regress on."""


def prepare_labelled_texts(
    files: Iterable[Path],
    tokenizer: Tokenizer,
    *,
    text_key: str,
    label_key: str,
    num_labels: int,
    max_seq_len: int,
) -> tuple[list[Sample], Account]:
    """Samples whose last token carries the label; longer texts lose their beginning, so that it stays the last.

    Raises:
        DataError: a row has no text or no label, or one out of range (its place is named); or there are none.
    """
    samples, account = [], Account()
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
            place = 0 if num_labels == 1 else int(label)
            samples.append(Sample(tuple(ids), (IGNORE_INDEX,) * (len(ids) - 1) + (place,), extras))
            account.samples += 1
            account.tokens += len(ids)
            account.trained_tokens += 1
    if not samples:
        raise DataError(f"no row is left to train on ({account.summary()}); check the data files")
    return samples, account


def _text(row: Row, key: str) -> str:
    value = row.values.get(key)
    if not isinstance(value, str):
        raise DataError(
            f"{row.place} has no text under {key!r} (keys: {', '.join(sorted(row.values))}); set data.text_key"
        )
    return value


def _label(row: Row, key: str, num_labels: int) -> int | float:
    value: Any = row.values.get(key)
    if isinstance(value, str):
        expected = (
            "a number" if num_labels == 1 else f"a class by its number, 0 to {num_labels - 1}"
        )
        raise DataError(
            f"{row.place} has label {value!r} under {key!r}, expected {expected}; write numbers for the names, or set "
            "data.label_key"
        )
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(
            f"{row.place} has label {value!r} under {key!r}, expected a number; set data.label_key"
        )
    if num_labels == 1:
        if not math.isfinite(value):
            raise DataError(f"{row.place} has label {value}, expected a finite number")
        return float(value)
    if not isinstance(value, int) or not 0 <= value < num_labels:
        raise DataError(
            f"{row.place} has label {value!r}, expected a class 0 to {num_labels - 1}; set objective.num_labels"
        )
    return value
