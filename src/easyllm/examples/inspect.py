"""Shows samples of a data file token by token, as training sees them, with counts of all rows."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonObject
from easyllm.core.progress import track
from easyllm.examples.conversations import RowKind, conversations, row_kind
from easyllm.examples.data_file import Row, read_rows
from easyllm.examples.preferences import (
    EncodedPair,
    encode_labelled,
    encode_preferences,
    labelled,
    preferences,
)
from easyllm.examples.prepare import (
    Encoded,
    PreparationStats,
    TooLong,
    TrainOn,
    encode_conversations,
)
from easyllm.tokenizer.stream import StreamDecoder
from easyllm.tokenizer.tokenizer import Tokenizer

NO_LIMIT = 2**62
SampleParts = tuple[Sequence[Encoded], Sequence[tuple[str, Encoded]]]
"""The sequences of a sample, and the parts to show, each with its heading."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The text of one token, or of several that form one character, and whether it is trained."""

    text: str
    token_ids: tuple[int, ...]
    trained: bool


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a sample with its heading.

    A conversation is one part; a preference pair has the parts prompt, chosen and rejected.
    """

    heading: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Inspected:
    """One sample and the location of its row."""

    location: str
    parts: tuple[Part, ...]


@dataclass(slots=True)
class Inspection:
    """The training data that a file gives for a model.

    Attributes:
        kind: kind of its rows: conversations, preference pairs, or responses with binary labels.
        account: counts of rows, samples and tokens.
        lengths: number of token ids of each retained sequence (two per pair), in file order.
        labels: number of responses with each binary label, as `good` and `bad`.
        samples: the first few samples.
    """

    kind: RowKind
    account: PreparationStats = field(default_factory=PreparationStats)
    lengths: list[int] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    samples: list[Inspected] = field(default_factory=list)

    def length_at(self, fraction: float) -> int:
        """Returns the length that `fraction` of the sequences do not exceed, 0 if there are none.

        Args:
            fraction: a quantile; 0.5 gives the median.
        """
        ordered = sorted(self.lengths)
        return ordered[math.ceil(fraction * len(ordered)) - 1] if ordered else 0

    def as_dict(self) -> JsonObject:
        """Returns plain values for JSON."""
        return {
            "kind": self.kind,
            "account": self.account.as_dict(),
            "labels": self.labels,
            "lengths": {
                "median": self.length_at(0.5),
                "p95": self.length_at(0.95),
                "max": self.length_at(1.0),
            },
            "samples": [_sample_dict(sample) for sample in self.samples],
        }


def inspect_file(
    path: Path,
    tokenizer: Tokenizer,
    *,
    num_samples: int = 3,
    max_seq_len: int | None = None,
    overlong: TooLong = "cut",
    train_on: TrainOn = "assistant",
    split_turns: bool = False,
) -> Inspection:
    """Inspects a data file of conversations, preference pairs or responses with binary labels.

    The first row determines which of the three the file contains. The options have the same
    meaning as in `prepare_conversations`.

    Args:
        num_samples: number of samples to return, from the beginning of the file.
        max_seq_len: maximum number of token ids in a sample; None for no limit.

    Raises:
        ConfigError: an option does not apply to this kind of row.
        DataError: the file is empty, or a row is invalid (the message gives its location).
    """
    rows = read_rows(path)
    first = next(rows)  # `read_rows` raises if the file is empty
    found = Inspection(row_kind(first.values))
    options = {"split_turns (--split-turns)": split_turns, "train_on": train_on == "all"}
    given = [option for option, is_set in options.items() if is_set]
    if found.kind != "conversation" and given:
        raise ConfigError(
            f"{str(path)!r} contains {found.kind} rows, of which only the responses are trained; "
            f"remove {' and '.join(given)}"
        )
    every_row = track(chain([first], rows), "inspecting", unit="row")
    limit = {"max_seq_len": max_seq_len or NO_LIMIT, "overlong": overlong}
    shown = _samples(every_row, found, tokenizer, limit, train_on, split_turns)
    for sequences, parts in shown:
        found.lengths += [len(encoded.token_ids) for encoded in sequences]
        if len(found.samples) < num_samples:
            pieces = tuple(
                Part(heading, tuple(pieces_of(tokenizer, encoded))) for heading, encoded in parts
            )
            found.samples.append(Inspected(sequences[0].location, pieces))
    return found


def pieces_of(tokenizer: Tokenizer, encoded: Encoded) -> Iterator[Piece]:
    """Yields the tokens of a sequence with their texts.

    Tokens that together form one character make up one piece. Bytes that do not form a character
    are shown as U+FFFD.
    """
    decoder, ids, trained = StreamDecoder(tokenizer, skip_special=False), list[int](), False
    for token_id, on in zip(encoded.token_ids, encoded.mask, strict=True):
        if ids and on != trained:
            yield Piece(decoder.flush(), tuple(ids), trained)
            decoder, ids = StreamDecoder(tokenizer, skip_special=False), []
        ids.append(token_id)
        trained = on
        text = decoder.push(token_id)
        if text:
            yield Piece(text, tuple(ids), trained)
            ids = []
    if ids:
        yield Piece(decoder.flush(), tuple(ids), trained)


def _samples(
    rows: Iterable[Row],
    found: Inspection,
    tokenizer: Tokenizer,
    limit: JsonObject,
    train_on: TrainOn,
    split_turns: bool,
) -> Iterator[SampleParts]:
    account = found.account
    match found.kind:
        case "conversation":
            options = limit | {"train_on": train_on, "split_turns": split_turns}
            chats = conversations(rows)
            for encoded in encode_conversations(chats, tokenizer, account, **options):
                yield (encoded,), [("conversation", encoded)]
        case "preference":
            for pair in encode_preferences(preferences(rows), tokenizer, account, **limit):
                yield (pair.chosen, pair.rejected), _parts_of(pair)
        case "labelled":
            for encoded, label in encode_labelled(labelled(rows), tokenizer, account, **limit):
                heading = "good" if label else "bad"
                found.labels[heading] = found.labels.get(heading, 0) + 1
                yield (encoded,), [(heading, encoded)]


def _parts_of(pair: EncodedPair) -> list[tuple[str, Encoded]]:
    at = pair.num_prompt
    return [
        ("prompt", pair.chosen.cut(at)),
        ("chosen", pair.chosen.after(at)),
        ("rejected", pair.rejected.after(at)),
    ]


def _sample_dict(sample: Inspected) -> JsonObject:
    parts = [
        {
            "heading": part.heading,
            "pieces": [
                {"text": p.text, "token_ids": list(p.token_ids), "trained": p.trained}
                for p in part.pieces
            ],
        }
        for part in sample.parts
    ]
    return {"place": sample.location, "parts": parts}
