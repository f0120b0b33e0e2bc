"""Prepares pairs of texts for contrastive training: a query, a matching text, and hard negatives.

    {"query": "...", "positive": "...", "negatives": ["...", "..."]}

A row becomes a group of sequences, the query first. Extras of each sequence:

    role  1 for the query, 2 for the positive, 3 for a negative; 0 is padding
    pair  number of the row         text  number of the text; equal texts have the same
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from easyllm.core.errors import DataError
from easyllm.examples.data_file import Row, read_rows
from easyllm.examples.prepare import PreparationStats
from easyllm.examples.sample import Sample, SampleGroup
from easyllm.ops.cross_entropy import IGNORE_INDEX
from easyllm.tokenizer.tokenizer import Tokenizer

ROLE, PAIR, TEXT = "role", "pair", "text"
QUERY, POSITIVE, NEGATIVE = 1, 2, 3


def prepare_text_pairs(
    files: Iterable[Path],
    tokenizer: Tokenizer,
    *,
    query_key: str,
    positive_key: str,
    negatives_key: str,
    max_seq_len: int,
) -> tuple[list[SampleGroup], PreparationStats]:
    """Reads and tokenizes pairs.

    Texts longer than `max_seq_len` are truncated at their end, and counted.

    Args:
        query_key, positive_key: keys of the two texts of a row.
        negatives_key: key of texts that do not match the query, which a row may lack.
        max_seq_len: maximum number of tokens of a text.

    Raises:
        DataError: a row lacks a text (the message has its location), or there are no rows.
    """
    groups, account, numbers = list[SampleGroup](), PreparationStats(), dict[str, int]()
    for file in files:
        for row in read_rows(file):
            texts = [
                _text(row, query_key),
                _text(row, positive_key),
                *_negatives(row, negatives_key),
            ]
            parts = []
            for place, text in enumerate(texts, start=1):
                ids = tokenizer.encode(text)
                if not ids:
                    raise DataError(f"{row.location} has a text without a token; remove the row")
                account.cut += len(ids) > max_seq_len
                extras = {
                    ROLE: min(place, NEGATIVE),
                    PAIR: account.rows,
                    TEXT: numbers.setdefault(text, len(numbers)),
                }
                parts.append(_sample(ids[:max_seq_len], extras))
            account.rows += 1
            account.samples += 1
            account.tokens += sum(part.num_tokens for part in parts)
            account.trained_tokens += len(parts)
            groups.append(SampleGroup(tuple(parts)))
    if not groups:
        raise DataError("there are no pairs of texts; check the data files")
    return groups, account


def _sample(ids: Sequence[int], extras: dict[str, int]) -> Sample:
    """Returns a sequence whose last token is marked as one with a loss."""
    labels = (*(IGNORE_INDEX,) * (len(ids) - 1), 0)
    return Sample(tuple(ids), labels, extras)


def _text(row: Row, key: str) -> str:
    value = row.values.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{row.location} has no text under {key!r} (keys: {', '.join(sorted(row.values))}); "
            "set data.query_key and data.positive_key"
        )
    return value


def _negatives(row: Row, key: str) -> list[str]:
    value = row.values.get(key, [])
    if not isinstance(value, list) or not all(isinstance(v, str) and v.strip() for v in value):
        raise DataError(f"{row.location} has {key} {value!r}, expected a list of texts")
    return value


__all__ = ["NEGATIVE", "PAIR", "POSITIVE", "QUERY", "ROLE", "TEXT", "prepare_text_pairs"]
