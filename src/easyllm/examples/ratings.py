"""Responses with a numeric score, such as a human rating: data for pointwise reward models.

{"prompt": ..., "completion": ..., "score": 4.5}      any conversation format, plus the score
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from easyllm.core.errors import DataError
from easyllm.core.json_types import Json, JsonObject
from easyllm.core.progress import track
from easyllm.corpus.files.row import Row
from easyllm.examples.conversations import row_kind
from easyllm.examples.data_file import read_rows
from easyllm.examples.prepare import (
    Encoded,
    PreparationStats,
    TooLong,
    check_samples,
)
from easyllm.examples.responses import encode_responses, last_response
from easyllm.tokenizer.messages import Message
from easyllm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class RatedResponse:
    """A prompt with one response and its score; a higher score is better."""

    prompt: list[Message]
    response: list[Message]
    score: float
    tools: list[JsonObject] | None
    location: str
    format: str


def read_ratings(path: Path, *, score_key: str = "score") -> Iterator[RatedResponse]:
    """Yields the rated responses in a data file.

    Args:
        score_key: key of the score in a row.

    Raises:
        DataError: a row is malformed or has no score; the message gives its location.
    """
    for row in read_rows(path):
        if row_kind(row.values) == "preference":
            raise DataError(
                f"{row.location} is a preference pair, expected one response with a score; set "
                "data.kind=preferences"
            )
        score = _score(row, score_key)
        prompt, response, conversation = last_response(row)
        kind = f"{conversation.format}-score"
        yield RatedResponse(prompt, response, score, conversation.tools, row.location, kind)


def prepare_ratings(
    given: Iterable[RatedResponse],
    tokenizer: Tokenizer,
    *,
    max_seq_len: int,
    overlong: TooLong = "cut",
) -> tuple[list[tuple[Encoded, float]], PreparationStats]:
    """Encodes rated responses with the tokenizer's chat template; see `prepare_labelled`.

    Raises:
        DataError: the template rejects a row (the message gives its location), or no trainable
            rows remain.
    """
    account, kept = PreparationStats(), list[tuple[Encoded, float]]()
    for row in track(given, "preparing", unit="row"):
        account.formats[row.format] += 1
        found = encode_responses(
            row.prompt,
            [row.response],
            row.tools,
            row.location,
            tokenizer,
            account,
            max_seq_len=max_seq_len,
            overlong=overlong,
        )
        if found is not None:
            kept.append((found[0][0], row.score))
    check_samples(account, max_seq_len)
    return kept, account


def _score(row: Row, key: str) -> float:
    value: Json = row.values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(
            f"{row.location} has score {value!r} under {key!r}, expected a finite number; "
            "set data.score_key"
        )
    return float(value)


__all__ = ["RatedResponse", "prepare_ratings", "read_ratings"]
