"""Real samples of a data file token by token, as training will see them, and an account of the whole file."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from easyllm.core.errors import ConfigError
from easyllm.core.progress import track
from easyllm.data.conversations import RowKind, conversations, row_kind
from easyllm.data.preferences import (
    EncodedPair,
    encode_labelled,
    encode_preferences,
    labelled,
    preferences,
)
from easyllm.data.prepare import Account, Encoded, Overlong, TrainOn, encode_conversations
from easyllm.data.rows import Row, read_rows
from easyllm.tokenizer.stream import StreamDecoder
from easyllm.tokenizer.tokenizer import Tokenizer

NO_LIMIT = 2**62
Shown = tuple[Sequence[Encoded], Sequence[tuple[str, Encoded]]]
"""The sequences of a sample, and what to show of them under which headings."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The text of one token, or of the several that make up one character, and whether they are trained."""

    text: str
    token_ids: tuple[int, ...]
    trained: bool


@dataclass(frozen=True, slots=True)
class Part:
    """A run of a sample under a heading: all of a conversation; prompt, chosen and rejected of a pair."""

    heading: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Inspected:
    """One sample and the row it comes from."""

    place: str
    parts: tuple[Part, ...]


@dataclass(slots=True)
class Inspection:
    """What a data file holds for a model.

    Attributes:
        kind: what its rows teach.
        lengths: ids of each sequence kept (two a pair), in the order of the file.
        labels: how many answers are good, and how many are not, where rows say so.
        samples: the first few.
    """

    kind: RowKind
    account: Account = field(default_factory=Account)
    lengths: list[int] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    samples: list[Inspected] = field(default_factory=list)

    def length_at(self, fraction: float) -> int:
        """The shortest length that `fraction` of the sequences do not exceed; 0 where there are none."""
        ordered = sorted(self.lengths)
        return ordered[math.ceil(fraction * len(ordered)) - 1] if ordered else 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
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
    overlong: Overlong = "cut",
    train_on: TrainOn = "assistant",
    split_turns: bool = False,
) -> Inspection:
    """What a data file of conversations, preference pairs or labelled answers holds for a model.

    The first row says which of the three the file is; the options mean what they mean in preparing it.

    Args:
        num_samples: samples shown, the first of the file.
        max_seq_len: most ids a sample may have; None for no limit.

    Raises:
        ConfigError: an option does not apply to such rows.
        DataError: the file is empty, or one of its rows is wrong (its place is named).
    """
    rows = read_rows(path)
    first = next(rows)  # an empty file is refused
    found = Inspection(row_kind(first.values))
    if found.kind != "conversation" and (split_turns or train_on == "all"):
        raise ConfigError(
            f"{str(path)!r} holds {found.kind} rows, of which only the answers are trained; "
            "leave split_turns and train_on out"
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
            found.samples.append(Inspected(sequences[0].place, pieces))
    return found


def pieces_of(tokenizer: Tokenizer, encoded: Encoded) -> Iterator[Piece]:
    """The tokens of a sequence with their texts; tokens that hold parts of one character stay together.

    Bytes that never become a character read U+FFFD.
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
    limit: dict[str, Any],
    train_on: TrainOn,
    split_turns: bool,
) -> Iterator[Shown]:
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
        ("chosen", pair.chosen.behind(at)),
        ("rejected", pair.rejected.behind(at)),
    ]


def _sample_dict(sample: Inspected) -> dict[str, Any]:
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
    return {"place": sample.place, "parts": parts}
