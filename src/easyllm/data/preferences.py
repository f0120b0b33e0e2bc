"""Judged answers: pairs of a better and a worse one (DPO), and single ones that are good or not (KTO).

    pair       {"prompt": ..., "chosen": ..., "rejected": ...}      which of two answers is better
    labelled   {"prompt": ..., "completion": ..., "label": true}    whether an answer is good

(Rafailov et al. 2023, arXiv 2305.18290; Ethayarajh et al. 2024, arXiv 2402.01306.)
Prompts and answers are text, messages, or ShareGPT turns. Both answers of a pair stand behind the same prompt, and the
prompt is never trained, whatever the assistant says in it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyllm.core.errors import DataError
from easyllm.core.progress import track
from easyllm.data.conversations import (
    LABEL_KEYS,
    Message,
    read_alpaca_prompt,
    read_conversation,
    read_messages,
    read_system,
    read_text,
    read_turns,
    row_kind,
    turn_list,
    unknown_format,
    with_system,
)
from easyllm.data.packing import Sample
from easyllm.data.prepare import (
    Account,
    Encoded,
    Overlong,
    check_samples,
    encode_messages,
    fit,
    num_shared,
)
from easyllm.data.row import Row
from easyllm.data.row_keys import check_keys
from easyllm.data.row_tools import read_tools
from easyllm.data.rows import read_rows
from easyllm.tokenizer.tokenizer import Tokenizer

PAIR_FORMS = """
  preference           {"prompt": "...", "chosen": "...", "rejected": "..."}, each text or messages
  implicit-preference  {"chosen": [messages], "rejected": [messages]}, the prompt being what both begin with
  sharegpt-preference  {"conversations": [turns], "chosen": {"from": "gpt", "value": "..."}, "rejected": {...}}
  messages-preference  {"messages": [messages], "chosen": {"role": "assistant", "content": "..."}, "rejected": {...}}
  alpaca-preference    {"instruction": "...", "input": "...", "chosen": "...", "rejected": "..."}"""
LABELLED_FORMS = """
  prompt-completion-label  {"prompt": "...", "completion": "...", "label": true}
  messages-label           {"messages": [...], "label": false}, judging the last message
  sharegpt-label, alpaca-label, question-answer-label: as those formats, with a label (or kto_tag)"""


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two answers to one prompt, the better and the worse; all three are lists of messages."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: list[dict[str, Any]] | None
    place: str
    format: str = "preference"


@dataclass(frozen=True, slots=True)
class LabelledCompletion:
    """An answer and whether it is good (`label`)."""

    prompt: list[Message]
    completion: list[Message]
    label: bool
    tools: list[dict[str, Any]] | None
    place: str
    format: str = "prompt-completion-label"


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """Both sequences of a pair; their first `num_prompt` ids are the same, and the prompt's."""

    chosen: Encoded
    rejected: Encoded
    num_prompt: int


@dataclass(frozen=True, slots=True)
class PairSample:
    """Both sequences of a pair as training takes them: only the answers carry labels.

    The first `num_prompt` ids of both are the prompt.
    """

    chosen: Sample
    rejected: Sample
    num_prompt: int


@dataclass(frozen=True, slots=True)
class LabelledSample:
    """A sequence whose answer carries labels, and whether that answer is good."""

    sample: Sample
    label: bool


def read_preferences(path: Path) -> Iterator[PreferencePair]:
    """The preference pairs in a data file.

    Raises:
        DataError: a row is no pair, or broken; its place is named.
    """
    yield from preferences(read_rows(path))


def preferences(rows: Iterable[Row]) -> Iterator[PreferencePair]:
    """Rows as preference pairs; each row's format is detected by its keys."""
    for row in rows:
        kind = detect_pair_format(row.values)
        if kind is None:
            raise unknown_format(row, PAIR_FORMS)
        yield _pair(row, kind)


def detect_pair_format(values: dict[str, Any]) -> str | None:
    """The name of the format a preference pair is in, or None."""
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
    """The labelled answers in a data file.

    Raises:
        DataError: a row has no label, or is broken; its place is named.
    """
    yield from labelled(read_rows(path))


def labelled(rows: Iterable[Row]) -> Iterator[LabelledCompletion]:
    """Rows as labelled answers; each row's format is detected by its keys."""
    for row in rows:
        label = _label(row)
        conversation = read_conversation(row)
        messages, prompt = conversation.messages, row.values.get("prompt")
        start = len(messages) - 1
        if conversation.format == "prompt-completion" and isinstance(prompt, list):
            start = len(with_system(read_messages(prompt, row), row))
        if not _is_answer(messages[:start], messages[start:]):
            raise DataError(
                f"{row.place}: the label judges the last message, which is from "
                f"{messages[start]['role'] if start < len(messages) else 'nobody'}; "
                "give a prompt and an answer of the assistant behind it"
            )
        kind = f"{conversation.format}-label"
        yield LabelledCompletion(
            messages[:start], messages[start:], label, conversation.tools, row.place, kind
        )


def prepare_preferences(
    pairs: Iterable[PreferencePair],
    tokenizer: Tokenizer,
    *,
    max_seq_len: int,
    overlong: Overlong = "cut",
) -> tuple[list[PairSample], Account]:
    """Samples of preference pairs under the tokenizer's chat template.

    A pair is dropped, and counted, where its answers are the same, or where one of them has no token left
    within the limit. Tokens are counted over both sequences.

    Args:
        max_seq_len: most ids either sequence may have, the last one (never an input) included.
        overlong: what happens to a pair with a longer one: `cut` at the end, or `drop`.

    Raises:
        DataError: the template refuses a row (its place is named), or nothing is left to train.
    """
    account = Account()
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
    account: Account,
    *,
    max_seq_len: int,
    overlong: Overlong = "cut",
) -> Iterator[EncodedPair]:
    """What `prepare_preferences` makes samples of, one after the other, counted in `account`."""
    for pair in pairs:
        account.rows += 1
        account.formats[pair.format] += 1
        both = tuple(
            encode_messages(
                [*pair.prompt, *answer],
                pair.tools,
                pair.place,
                tokenizer,
                num_prompt=len(pair.prompt),
            )
            for answer in (pair.chosen, pair.rejected)
        )
        account.note(*both)
        kept = fit(both, account, max_seq_len=max_seq_len, overlong=overlong)
        if kept is not None:
            yield EncodedPair(kept[0], kept[1], _num_prompt(*kept))


def prepare_labelled(
    completions: Iterable[LabelledCompletion],
    tokenizer: Tokenizer,
    *,
    max_seq_len: int,
    overlong: Overlong = "cut",
) -> tuple[list[LabelledSample], Account]:
    """Samples of labelled answers under the tokenizer's chat template.

    Args:
        max_seq_len: most ids a sample may have, the last one (never an input) included.
        overlong: what happens to a longer one: `cut` at the end, or `drop`.

    Raises:
        DataError: the template refuses a row (its place is named), or nothing is left to train.
    """
    account = Account()
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
    account: Account,
    *,
    max_seq_len: int,
    overlong: Overlong = "cut",
) -> Iterator[tuple[Encoded, bool]]:
    """What `prepare_labelled` makes samples of, one after the other, counted in `account`."""
    for row in completions:
        account.rows += 1
        account.formats[row.format] += 1
        encoded = encode_messages(
            [*row.prompt, *row.completion],
            row.tools,
            row.place,
            tokenizer,
            num_prompt=len(row.prompt),
        )
        account.note(encoded)
        kept = fit((encoded,), account, max_seq_len=max_seq_len, overlong=overlong)
        if kept is not None:
            yield kept[0], row.label


def _pair(row: Row, kind: str) -> PreferencePair:
    check_keys(row, kind, read=("chosen", "rejected"))
    prompt = _prompt(row, kind)
    chosen, rejected = _answer(row, "chosen"), _answer(row, "rejected")
    if (
        prompt == read_system(row) or chosen[0]["role"] != "assistant"
    ):  # the answers bring the prompt along
        given, length = prompt, num_shared(chosen, rejected)
        length = min(length, len(chosen) - 1, len(rejected) - 1)
        prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
        if given == read_system(row):  # a system prompt alone, or nothing
            prompt = with_system(prompt, row)
        elif given[-1] not in prompt:
            raise DataError(
                f"{row.place}: chosen and rejected begin with another prompt than the row's; "
                "give the prompt once, apart or at the beginning of both"
            )
    if not _is_answer(prompt, chosen) or not _is_answer(prompt, rejected):
        raise DataError(
            f"{row.place}: chosen and rejected are no two answers to one prompt; "
            "both must go on with an assistant message behind the same messages"
        )
    return PreferencePair(prompt, chosen, rejected, read_tools(row), row.place, kind)


def _prompt(row: Row, kind: str) -> list[Message]:
    match kind:
        case "sharegpt-preference" | "messages-preference":
            return read_turns(row)
        case "alpaca-preference":
            return read_alpaca_prompt(row)
        case "implicit-preference":
            return read_system(row)
    key = "prompt" if "prompt" in row.values else "question"
    if isinstance(row.values[key], list):
        return with_system(read_messages(row.values[key], row), row)
    return [*read_system(row), {"role": "user", "content": read_text(row, key)}]


def _answer(row: Row, key: str) -> list[Message]:
    """An answer given as text, as a message, as a turn, or as a list of those."""
    value = row.values[key]
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    parts = value if isinstance(value, list) else [value]
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise DataError(
            f"{row.place}: {key} is no answer; give text, a message, or a list of messages"
        )
    return read_messages(parts, row, name=key)


def _is_answer(prompt: list[Message], answer: list[Message]) -> bool:
    return bool(prompt) and bool(answer) and answer[0]["role"] == "assistant"


def _num_prompt(*sequences: Encoded) -> int:
    """Ids the sequences share before the first trained one in any of them."""
    first = min(list(encoded.mask).index(True, 1) for encoded in sequences)
    return num_shared(*(encoded.token_ids[:first] for encoded in sequences))


def _label(row: Row) -> bool:
    if row_kind(row.values) == "preference":
        raise unknown_format(row, LABELLED_FORMS)
    given = {key: row.values[key] for key in LABEL_KEYS if key in row.values}
    if not given:
        raise unknown_format(row, LABELLED_FORMS)
    label = next(iter(given.values()))
    if not isinstance(label, bool) or any(other is not label for other in given.values()):
        raise DataError(
            f"{row.place}: {' and '.join(given)} is {label!r}; "
            "expected true for a good answer or false for a bad one"
        )
    return label
