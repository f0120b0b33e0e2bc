"""Reads rows of the common formats as conversations in OpenAI's message format."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from easyllm.core.errors import DataError
from easyllm.core.json_types import Json, JsonObject
from easyllm.corpus.files.row import Row
from easyllm.examples.data_file import read_rows
from easyllm.examples.tools import read_function_call, read_tools
from easyllm.examples.unsupported_keys import check_keys
from easyllm.tokenizer.messages import TRAIN_KEYS, Message, normalise_messages

RowKind = Literal["conversation", "preference", "labelled"]


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation read from one row.

    Attributes:
        messages: each with `role` and `content`, and optionally `tool_calls`.
        tools: the tools offered to the assistant.
        location: location of the row (`file:line`).
        format: name of the format that the row was in.
    """

    messages: list[Message]
    tools: list[JsonObject] | None
    location: str
    format: str = "messages"


SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
"""Maps roles of ShareGPT, ms-swift, Llama 3 and others to the roles that chat templates know.
Other roles of a message are left unchanged, and rejected if the chat template does not write them
(`easyllm.tokenizer.chat`)."""
CALL_ROLES = ("function_call", "tool_call")
"""Roles of turns that are tool calls, as JSON text or objects (ShareGPT's and ms-swift's names)."""
LABEL_KEYS = ("label", "kto_tag")
"""Keys of the binary label of a response, true if it is good (TRL's and LLaMA-Factory's names)."""
TURN_LISTS = ("messages", "conversations")
"""Keys of a list of turns in either form: role and content, or from and value."""
QUESTION_CONTEXT_KEYS = frozenset(["choices", "options", "context", "passage"])
"""Keys that belong to the question. A row with one of them is not read as question and answer,
because the answer would be trained without it."""
_PREFERENCES = (
    "train with an objective that compares responses (objective.kind=dpo data.kind=preferences; "
    "docs/alignment.md), or on the chosen or good ones alone, which "
    "`easyllm data chosen FILE NEW.jsonl` writes"
)
KNOWN_FORMS = """
  messages           {"messages": [{"role": "user", "content": "..."}, \
{"role": "assistant", "content": "..."}]}
  alpaca             {"instruction": "...", "input": "...", "output": "..."}
  sharegpt           {"conversations": [{"from": "human", "value": "..."}, \
{"from": "gpt", "value": "..."}]}
  prompt-completion  {"prompt": "...", "completion": "..."}
  question-answer    {"question": "...", "answer": "..."}"""


def row_kind(values: JsonObject) -> RowKind:
    """Returns whether a row is a conversation, a preference pair, or has a binary label."""
    if "chosen" in values and "rejected" in values:
        return "preference"
    if any(isinstance(values.get(key), bool) for key in LABEL_KEYS):
        return "labelled"
    return "conversation"


def detect_format(values: JsonObject) -> str | None:
    """Returns the name of the row's conversation format, or None if it is unknown."""
    if row_kind(values) == "preference":
        return None
    if (key := turn_list(values)) is not None:
        return "sharegpt" if _are_sharegpt(values[key]) else "messages"
    if "instruction" in values and "output" in values:
        return "alpaca"
    if "prompt" in values and "completion" in values:
        return "prompt-completion"
    if "question" in values and "answer" in values and not QUESTION_CONTEXT_KEYS & values.keys():
        return "question-answer"
    return None


def turn_list(values: JsonObject) -> str | None:
    """Returns the key under which a row stores a list of turns, or None."""
    return next((key for key in TURN_LISTS if isinstance(values.get(key), list)), None)


def read_conversations(path: Path) -> Iterator[Conversation]:
    """Yields the conversations in a data file.

    Raises:
        DataError: a row is malformed, has an unknown format, or is not a conversation; the message
            gives its location.
    """
    yield from conversations(read_rows(path))


def conversations(rows: Iterable[Row]) -> Iterator[Conversation]:
    """Yields rows as conversations; the format of each row is detected from its keys.

    Raises:
        DataError: as in `read_conversations`.
    """
    for row in rows:
        kind = row_kind(row.values)
        if kind == "preference":
            raise DataError(
                f"{row.location} is a preference pair (chosen and rejected), expected a "
                f"conversation; {_PREFERENCES}"
            )
        if kind == "labelled":
            raise DataError(
                f"{row.location} has a binary label (true or false), so its response may be bad; "
                + _PREFERENCES
            )
        conversation = read_conversation(row)
        _refuse_numbers_as_labels(row)
        yield conversation


def _refuse_numbers_as_labels(row: Row) -> None:
    for key in LABEL_KEYS:
        if isinstance(value := row.values.get(key), int | float) and value in (0, 1):
            raise DataError(
                f"{row.location} has {key} {value}, which may mark its response as bad; "
                "give true or false for the KTO objective, or remove the key"
            )


def read_conversation(row: Row) -> Conversation:
    """Returns one row as a conversation, ignoring any label that it has.

    Raises:
        DataError: the row is malformed or has an unknown format.
    """
    kind = detect_format(row.values)
    if kind is None:
        raise unknown_format(row, KNOWN_FORMS)
    check_keys(row, kind)
    messages = _READERS[kind](row)
    if not any(m.get("role") == "assistant" for m in messages):
        raise DataError(
            f"{row.location} has no assistant turn, so there is nothing to train on; "
            "add one or remove the row"
        )
    return Conversation(messages, read_tools(row), row.location, kind)


def unknown_format(row: Row, forms: str) -> DataError:
    """Returns the error for a row in none of the formats `forms`.

    The message lists the formats and, if it can be determined, what is wrong with the row.
    """
    keys = ", ".join(sorted(row.values)) or "none"
    return DataError(
        f"{row.location} has an unknown format (keys: {keys}){_diagnosis(row.values)}; "
        f"expected one of:{forms}"
    )


def _diagnosis(values: JsonObject) -> str:
    for key in TURN_LISTS:
        if key in values:
            given = (
                "text" if isinstance(values[key], str) else f"of type {type(values[key]).__name__}"
            )
            given = "null" if values[key] is None else given
            return (
                f": {key} is {given}, "
                'expected a list like [{"role": "user", "content": "..."}, ...]'
            )
    for question, answer in (
        ("instruction", "output"),
        ("prompt", "completion"),
        ("question", "answer"),
    ):
        for has, lacks in ((question, answer), (answer, question)):
            if has in values and lacks not in values:
                return f": it has {has!r} but no {lacks!r}"
    if isinstance(values.get("text"), str):
        return ": it is plain text, which `easyllm data build` packs for pretraining"
    return ""


def read_messages(
    values: list[Json], row: Row, *, turns: bool = False, name: str = ""
) -> list[Message]:
    """Returns the turns of a list as messages, whichever form each turn is in.

    Keys of a turn other than those of its form are retained: the chat template may read them
    (`reasoning_content`), or the loss mask may (`weight`).

    Args:
        turns: whether an element in neither form is reported as an invalid turn rather than as an
            invalid message.
        name: how errors refer to a turn; by default by its number.

    Raises:
        DataError: a turn is malformed or of an unknown role.
    """
    messages = [
        _read_any(turn, row, name or f"turn {number}", turns=turns)
        for number, turn in enumerate(values)
    ]
    messages = _merge_calls(messages, [_is_call(turn) for turn in values])
    for number, message in enumerate(messages):
        if isinstance(message, dict) and isinstance(message.get("role"), str):
            if not any(key in message for key in _CONTENT_KEYS):
                raise DataError(
                    f"{row.location}: message {number} has no text content; give content as a "
                    "string"
                )
            role = message["role"]
            messages[number] = message | {"role": SHAREGPT_ROLES.get(role, role)}
    try:
        checked = normalise_messages(messages)
    except DataError as error:
        raise DataError(f"{row.location}: {error}") from None
    return [_with_training_keys(m, given) for m, given in zip(checked, messages, strict=True)]


def _read_any(turn: Json, row: Row, name: str, *, turns: bool) -> Json:
    """Returns a turn of either form as a message; anything else is returned unchanged."""
    if _is_sharegpt(turn, turns):
        return read_turn(turn, row, name)
    if _is_call(turn):
        rest = {k: v for k, v in turn.items() if k not in ("role", "content")}
        return rest | read_function_call(turn.get("content"), row, name, turn["role"])
    return turn


def _merge_calls(messages: list[Json], is_call: list[bool]) -> list[Json]:
    """Merges consecutive tool-call turns into one message; ms-swift writes one turn per call."""
    merged: list[Json] = []
    for number, message in enumerate(messages):
        follows = number > 0 and is_call[number - 1] and is_call[number]
        if follows and _but_calls(merged[-1]) == _but_calls(message):
            merged[-1] = message | {"tool_calls": merged[-1]["tool_calls"] + message["tool_calls"]}
        else:
            merged.append(message)
    return merged


def _is_call(turn: Json) -> bool:
    """Returns whether the role of a turn says that it consists of tool calls only."""
    speaker = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
    is_named = isinstance(speaker, str) and speaker in CALL_ROLES
    return is_named and not turn.get("tool_calls")


def _but_calls(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "tool_calls"}


_CONTENT_KEYS = ("content", "tool_calls", "function_call", "refusal")


def _with_training_keys(message: Message, given: Message) -> Message:
    return message | {key: given[key] for key in TRAIN_KEYS if given.get(key) is not None}


def read_turn(turn: object, row: Row, name: str) -> Message:
    """Returns a ShareGPT turn, `{"from": ..., "value": ...}`, as a message.

    Args:
        name: how errors refer to the turn.

    Raises:
        DataError: the turn has no text, an unknown speaker, or a malformed tool call.
    """
    turn = turn if isinstance(turn, dict) else {}
    speaker, value = turn.get("from"), turn.get("value", turn.get("content"))
    rest = {k: v for k, v in turn.items() if k not in ("from", "value", "content", "role")}
    if isinstance(speaker, str) and speaker in CALL_ROLES and value is not None:
        return rest | read_function_call(value, row, name, speaker)
    if not isinstance(value, str | list):
        raise DataError(f"{row.location}: {name} has no text value; give from and value")
    if speaker not in SHAREGPT_ROLES:
        raise DataError(
            f"{row.location}: {name} is from {speaker!r}; expected one of "
            f"{', '.join([*SHAREGPT_ROLES, *CALL_ROLES])}"
        )
    return rest | {"role": SHAREGPT_ROLES[speaker], "content": value}


def _is_sharegpt(turn: object, by_default: bool) -> bool:
    if not isinstance(turn, dict):
        return by_default
    return "from" in turn or (by_default and "role" not in turn)


def _are_sharegpt(turns: list[Json]) -> bool:
    return bool(turns) and isinstance(turns[0], dict) and "from" in turns[0]


def read_turns(row: Row) -> list[Message]:
    """Returns the system prompt and the turns of a row that has a list of turns."""
    key = turn_list(row.values)
    assert key is not None, "the format was detected from this list"
    messages = read_messages(row.values[key], row, turns=key == "conversations")
    return with_system(messages, row)


def with_system(messages: list[Message], row: Row) -> list[Message]:
    """Returns the messages preceded by the system prompt of the row, if it has one.

    Raises:
        DataError: the messages begin with a different system prompt.
    """
    system = read_system(row)
    if not system or messages[:1] == system:
        return messages
    if messages and messages[0]["role"] == "system":
        raise DataError(
            f"{row.location} has two system prompts, under 'system' and in its first message; "
            "keep one of them"
        )
    return [*system, *messages]


def read_alpaca_prompt(row: Row) -> list[Message]:
    """Returns the prompt of an Alpaca row: system prompt, history, instruction and input."""
    messages = read_system(row)
    for question, answer in _history(row):
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    text = read_text(row, "instruction")
    if row.values.get("input"):
        text += "\n" + read_text(row, "input")
    return [*messages, {"role": "user", "content": text}]


def read_system(row: Row) -> list[Message]:
    """Returns the row's `system` (or `system_prompt`) as a list of one message, or an empty list.

    Raises:
        DataError: the system prompt is not text, or both keys are set and differ.
    """
    given = {key: row.values[key] for key in ("system", "system_prompt") if row.values.get(key)}
    for key, value in given.items():
        if not isinstance(value, str):
            raise DataError(
                f"{row.location}: {key} is of type {type(value).__name__}, expected text"
            )
    if len(set(given.values())) > 1:
        raise DataError(
            f"{row.location} has both system and system_prompt, and they differ; keep one of them"
        )
    return [{"role": "system", "content": text} for text in list(given.values())[:1]]


def read_text(row: Row, key: str) -> str:
    """Returns the text under `key`.

    Raises:
        DataError: the value is not text.
    """
    value = row.values[key]
    if not isinstance(value, str):
        raise DataError(f"{row.location}: {key} is of type {type(value).__name__}, expected text")
    return value


def _alpaca(row: Row) -> list[Message]:
    prompt = read_alpaca_prompt(row)
    return [*prompt, {"role": "assistant", "content": read_text(row, "output")}]


def _prompt_completion(row: Row) -> list[Message]:
    prompt, completion = row.values["prompt"], row.values["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return with_system(read_messages([*prompt, *completion], row), row)
    return _exchange(row, "prompt", "completion")


def _question_answer(row: Row) -> list[Message]:
    return _exchange(row, "question", "answer")


def _exchange(row: Row, question: str, answer: str) -> list[Message]:
    return [
        *read_system(row),
        {"role": "user", "content": read_text(row, question)},
        {"role": "assistant", "content": read_text(row, answer)},
    ]


def _history(row: Row) -> list[list[str]]:
    pairs = row.values.get("history") or []
    if not isinstance(pairs, list) or any(
        not isinstance(pair, list) or [type(text) for text in pair] != [str, str] for pair in pairs
    ):
        raise DataError(f"{row.location}: history is not a list of pairs like [question, answer]")
    return pairs


_READERS: dict[str, Callable[[Row], list[Message]]] = {
    "messages": read_turns,
    "sharegpt": read_turns,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
    "question-answer": _question_answer,
}
