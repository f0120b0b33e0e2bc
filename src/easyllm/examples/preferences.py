"""Preference data: pairs of a better and a worse response (DPO), and binary labels (KTO).

    pair       {"prompt": ..., "chosen": ..., "rejected": ...}      which of two responses is better
    labelled   {"prompt": ..., "completion": ..., "label": true}    whether a response is good

(Rafailov et al. 2023, arXiv 2305.18290; Ethayarajh et al. 2024, arXiv 2402.01306.)
Prompts and responses are text, messages, or ShareGPT turns. Both responses of a pair follow the
same prompt. The prompt is never trained, including assistant turns in it.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from easyllm.core.errors import DataError
from easyllm.core.json_types import JsonObject
from easyllm.core.progress import track
from easyllm.core.sequences import num_equal
from easyllm.corpus.files.row import Row
from easyllm.examples.conversations import (
    LABEL_KEYS,
    read_alpaca_prompt,
    read_system,
    read_turns,
    row_kind,
    turn_list,
    unknown_format,
    with_system,
)
from easyllm.examples.data_file import read_rows
from easyllm.examples.prepare import (
    Encoded,
    PreparationStats,
    TooLong,
    check_samples,
)
from easyllm.examples.responses import (
    encode_responses,
    is_response,
    last_response,
    read_prompt,
    read_response,
)
from easyllm.examples.sample import Sample
from easyllm.examples.tools import read_tools
from easyllm.examples.unsupported_keys import check_keys
from easyllm.tokenizer.messages import Message
from easyllm.tokenizer.tokenizer import Tokenizer

PAIR_FORMS = """
  preference           {"prompt": "...", "chosen": "...", "rejected": "..."}, each text or messages
  implicit-preference  {"chosen": [messages], "rejected": [messages]}, \
with the prompt as their common prefix
  sharegpt-preference  {"conversations": [turns], "chosen": {"from": "gpt", "value": "..."}, \
"rejected": {...}}
  messages-preference  {"messages": [messages], "chosen": {"role": "assistant", "content": "..."}, \
"rejected": {...}}
  alpaca-preference    {"instruction": "...", "input": "...", "chosen": "...", "rejected": "..."}"""
LABELLED_FORMS = """
  prompt-completion-label  {"prompt": "...", "completion": "...", "label": true}
  messages-label           {"messages": [...], "label": false}, which labels the last message
  sharegpt-label, alpaca-label, question-answer-label: those formats plus a label (or kto_tag)"""


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A prompt with a better and a worse response; all three are lists of messages."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: list[JsonObject] | None
    location: str
    format: str = "preference"
    margin: float | None = None


@dataclass(frozen=True, slots=True)
class LabelledCompletion:
    """A prompt with one response and whether that response is good (`label`)."""

    prompt: list[Message]
    completion: list[Message]
    label: bool
    tools: list[JsonObject] | None
    location: str
    format: str = "prompt-completion-label"


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """Both sequences of a pair; the first `num_prompt` ids of both are the shared prompt."""

    chosen: Encoded
    rejected: Encoded
    num_prompt: int


@dataclass(frozen=True, slots=True)
class PairSample:
    """Both sequences of a pair as training samples; only the responses carry labels.

    The first `num_prompt` ids of both are the shared prompt.
    """

    chosen: Sample
    rejected: Sample
    num_prompt: int


@dataclass(frozen=True, slots=True)
class LabelledSample:
    """A training sample in which only the response carries labels, and whether that is good."""

    sample: Sample
    label: bool


def read_preferences(path: Path) -> Iterator[PreferencePair]:
    """Yields the preference pairs in a data file.

    Raises:
        DataError: a row is malformed or not a preference pair; the message gives its location.
    """
    yield from preferences(read_rows(path))


def preferences(rows: Iterable[Row]) -> Iterator[PreferencePair]:
    """Yields rows as preference pairs; the format of each row is detected from its keys.

    Raises:
        DataError: as in `read_preferences`.
    """
    for row in rows:
        yield preference(row)


def preference(row: Row) -> PreferencePair:
    """Returns a row as a preference pair.

    Raises:
        DataError: as in `read_preferences`.
    """
    kind = detect_pair_format(row.values)
    if kind is None:
        raise unknown_format(row, PAIR_FORMS)
    return _pair(row, kind)


def detect_pair_format(values: JsonObject) -> str | None:
    """Returns the name of the row's preference format, or None if it is not a known pair."""
    if row_kind(values) != "preference":
        return None
    if (key := turn_list(values)) is not None:
        return "sharegpt-preference" if key == "conversations" else "messages-preference"
    if "instruction" in values:
        return "alpaca-preference"
    if "prompt" in values or "question" in values:
        return "preference"
    both_lists = isinstance(values["chosen"], list) and isinstance(values["rejected"], list)
    return "implicit-preference" if both_lists else None


def read_labelled(path: Path) -> Iterator[LabelledCompletion]:
    """Yields the responses with binary labels in a data file.

    Raises:
        DataError: a row is malformed or has no label; the message gives its location.
    """
    yield from labelled(read_rows(path))


def labelled(rows: Iterable[Row]) -> Iterator[LabelledCompletion]:
    """Yields rows as responses with binary labels; each row's format is detected from its keys.

    Raises:
        DataError: as in `read_labelled`.
    """
    for row in rows:
        label = _label(row)
        prompt, completion, conversation = last_response(row)
        kind = f"{conversation.format}-label"
        yield LabelledCompletion(prompt, completion, label, conversation.tools, row.location, kind)


def prepare_preferences(
    pairs: Iterable[PreferencePair],
    tokenizer: Tokenizer,
    *,
    max_seq_len: int,
    overlong: TooLong = "cut",
) -> tuple[list[PairSample], PreparationStats]:
    """Encodes preference pairs with the tokenizer's chat template.

    A pair is dropped and counted if its responses are identical, or if one of them has no token
    within the length limit. Token counts include both sequences.

    Args:
        max_seq_len: maximum number of ids in either sequence, including the last one, which is
            never an input.
        overlong: what to do with a pair that is too long: `cut` truncates it at the end, `drop`
            removes it.

    Returns:
        The samples, and counts of what became of the rows.

    Raises:
        DataError: the template rejects a row (the message gives its location), or no trainable
            rows remain.
    """
    account = PreparationStats()
    encoded = encode_preferences(
        track(pairs, "preparing", unit="row"),
        tokenizer,
        account,
        max_seq_len=max_seq_len,
        overlong=overlong,
    )
    samples = [
        PairSample(pair.chosen.sample(), pair.rejected.sample(), pair.num_prompt)
        for pair in encoded
    ]
    check_samples(account, max_seq_len)
    return samples, account


def encode_preferences(
    pairs: Iterable[PreferencePair],
    tokenizer: Tokenizer,
    account: PreparationStats,
    *,
    max_seq_len: int,
    overlong: TooLong = "cut",
) -> Iterator[EncodedPair]:
    """Yields the encoded pairs for `prepare_preferences`, and counts them in `account`."""
    for pair in pairs:
        account.formats[pair.format] += 1
        found = encode_responses(
            pair.prompt,
            [pair.chosen, pair.rejected],
            pair.tools,
            pair.location,
            tokenizer,
            account,
            max_seq_len=max_seq_len,
            overlong=overlong,
        )
        if found is not None:
            (chosen, rejected), num_prompt = found
            yield EncodedPair(chosen, rejected, num_prompt)


def prepare_labelled(
    completions: Iterable[LabelledCompletion],
    tokenizer: Tokenizer,
    *,
    max_seq_len: int,
    overlong: TooLong = "cut",
) -> tuple[list[LabelledSample], PreparationStats]:
    """Encodes responses with binary labels with the tokenizer's chat template.

    Args:
        max_seq_len: maximum number of ids in a sample, including the last one, which is never an
            input.
        overlong: what to do with a sample that is too long: `cut` truncates it at the end, `drop`
            removes it.

    Returns:
        The samples, and counts of what became of the rows.

    Raises:
        DataError: the template rejects a row (the message gives its location), or no trainable
            rows remain.
    """
    account = PreparationStats()
    encoded = encode_labelled(
        track(completions, "preparing", unit="row"),
        tokenizer,
        account,
        max_seq_len=max_seq_len,
        overlong=overlong,
    )
    samples = [LabelledSample(item.sample(), label) for item, label in encoded]
    check_samples(account, max_seq_len)
    return samples, account


def encode_labelled(
    completions: Iterable[LabelledCompletion],
    tokenizer: Tokenizer,
    account: PreparationStats,
    *,
    max_seq_len: int,
    overlong: TooLong = "cut",
) -> Iterator[tuple[Encoded, bool]]:
    """Yields the encoded sequences for `prepare_labelled`, and counts them in `account`."""
    for row in completions:
        account.formats[row.format] += 1
        found = encode_responses(
            row.prompt,
            [row.completion],
            row.tools,
            row.location,
            tokenizer,
            account,
            max_seq_len=max_seq_len,
            overlong=overlong,
        )
        if found is not None:
            yield found[0][0], row.label


def _pair(row: Row, kind: str) -> PreferencePair:
    check_keys(row, kind, read=("chosen", "rejected", "margin"))
    prompt = _prompt(row, kind)
    chosen, rejected = (read_response(row, row.values[k], k) for k in ("chosen", "rejected"))
    if (
        prompt == read_system(row) or chosen[0]["role"] != "assistant"
    ):  # the responses contain the prompt
        given, length = prompt, num_equal(chosen, rejected)
        length = min(length, len(chosen) - 1, len(rejected) - 1)
        prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
        if given == read_system(row):  # a system prompt alone, or nothing
            prompt = with_system(prompt, row)
        elif given[-1] not in prompt:
            raise DataError(
                f"{row.location}: chosen and rejected start with a different prompt than the "
                "row's; give the prompt once, either separately or at the start of both"
            )
    if not is_response(prompt, chosen) or not is_response(prompt, rejected):
        raise DataError(
            f"{row.location}: chosen and rejected are not two responses to one prompt; "
            "both must continue the same messages with an assistant message"
        )
    return PreferencePair(
        prompt, chosen, rejected, read_tools(row), row.location, kind, _margin(row)
    )


def _prompt(row: Row, kind: str) -> list[Message]:
    match kind:
        case "sharegpt-preference" | "messages-preference":
            return read_turns(row)
        case "alpaca-preference":
            return read_alpaca_prompt(row)
        case "implicit-preference":
            return read_system(row)
    return read_prompt(row)


def _margin(row: Row) -> float | None:
    """Returns how much better the chosen response is, if the row says so."""
    value = row.values.get("margin")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise DataError(
            f"{row.location}: margin is {value!r}, expected a finite number of at least 0"
        )
    return float(value)


def _label(row: Row) -> bool:
    if row_kind(row.values) == "preference":
        raise unknown_format(row, LABELLED_FORMS)
    given = {key: row.values[key] for key in LABEL_KEYS if key in row.values}
    if not given:
        raise unknown_format(row, LABELLED_FORMS)
    label = next(iter(given.values()))
    if not isinstance(label, bool) or any(other is not label for other in given.values()):
        raise DataError(
            f"{row.location}: {' and '.join(given)} is {label!r}; "
            "expected true for a good response or false for a bad one"
        )
    return label
