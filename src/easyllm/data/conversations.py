"""Rows of the usual formats as conversations in OpenAI's message form."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from easyllm.core.errors import DataError
from easyllm.data.row import Row
from easyllm.data.row_keys import check_keys
from easyllm.data.row_tools import read_function_call, read_tools
from easyllm.data.rows import read_rows
from easyllm.tokenizer.messages import TRAIN_KEYS, Message, normalise_messages

RowKind = Literal["conversation", "preference", "labelled"]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages (`role`, `content`, perhaps `tool_calls`), the tools offered, the row's place and its format."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    place: str
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
"""Who speaks, in ShareGPT, ms-swift, Llama 3 and others -> the role that chat templates know. Other roles are kept, and
refused where the template does not write them (`easyllm.tokenizer.chat`)."""
CALL_ROLES = ("function_call", "tool_call")
"""Turns that are calls, as JSON text or objects (ShareGPT's name and ms-swift's)."""
LABEL_KEYS = ("label", "kto_tag")
"""Keys whose true or false says whether an answer is good (TRL's name and LLaMA-Factory's)."""
TURN_LISTS = ("messages", "conversations")
"""Keys of a list of turns, in either form: role and content, or from and value."""
BESIDE_A_QUESTION = frozenset(["choices", "options", "context", "passage"])
"""Keys that belong to the question: without them a question and its answer would be learnt blind."""
KNOWN_FORMS = """
  messages           {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
  alpaca             {"instruction": "...", "input": "...", "output": "..."}
  sharegpt           {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
  prompt-completion  {"prompt": "...", "completion": "..."}
  question-answer    {"question": "...", "answer": "..."}"""


def row_kind(values: dict[str, Any]) -> RowKind:
    """What a row teaches: a conversation, which of two answers is better, or whether one answer is good."""
    if "chosen" in values and "rejected" in values:
        return "preference"
    if any(isinstance(values.get(key), bool) for key in LABEL_KEYS):
        return "labelled"
    return "conversation"


def detect_format(values: dict[str, Any]) -> str | None:
    """The name of the format a conversation is in, or None."""
    if row_kind(values) == "preference":
        return None
    if (key := turn_list(values)) is not None:
        return "sharegpt" if _are_sharegpt(values[key]) else "messages"
    if "instruction" in values and "output" in values:
        return "alpaca"
    if "prompt" in values and "completion" in values:
        return "prompt-completion"
    if "question" in values and "answer" in values and not BESIDE_A_QUESTION & values.keys():
        return "question-answer"
    return None


def turn_list(values: dict[str, Any]) -> str | None:
    """The key under which a row holds a list of turns, if any."""
    return next((key for key in TURN_LISTS if isinstance(values.get(key), list)), None)


def read_conversations(path: Path) -> Iterator[Conversation]:
    """The conversations in a data file.

    Raises:
        DataError: a row is in no known format, broken, or no conversation; its place is named.
    """
    yield from conversations(read_rows(path))


def conversations(rows: Iterable[Row]) -> Iterator[Conversation]:
    """Rows as conversations; each row's format is detected by its keys."""
    for row in rows:
        kind = row_kind(row.values)
        if kind == "preference":
            raise DataError(
                f"{row.place} is a preference pair (chosen and rejected), expected a conversation; "
                "train on it with a preference objective, or keep the chosen answer alone"
            )
        if kind == "labelled":
            raise DataError(
                f"{row.place} labels its answer true or false, so it may be a bad one; "
                "train on it with the KTO objective, or keep the good answers and remove the label"
            )
        conversation = read_conversation(row)
        _refuse_numbers_as_labels(row)
        yield conversation


def _refuse_numbers_as_labels(row: Row) -> None:
    for key in LABEL_KEYS:
        if isinstance(value := row.values.get(key), int | float) and value in (0, 1):
            raise DataError(
                f"{row.place} has {key} {value}, which may say that its answer is a bad one; give true or false for "
                "the KTO objective, or remove the key"
            )


def read_conversation(row: Row) -> Conversation:
    """One row as a conversation, whatever else the row says of it.

    Raises:
        DataError: the row is in no known format, or broken.
    """
    kind = detect_format(row.values)
    if kind is None:
        raise unknown_format(row, KNOWN_FORMS)
    check_keys(row, kind)
    messages = _READERS[kind](row)
    if not any(m.get("role") == "assistant" for m in messages):
        raise DataError(
            f"{row.place} has no assistant turn, so there is nothing to learn; add one or remove the row"
        )
    return Conversation(messages, read_tools(row), row.place, kind)


def unknown_format(row: Row, forms: str) -> DataError:
    """The error for a row that is in none of `forms`: what is wrong with it where that can be told, and the forms."""
    keys = ", ".join(sorted(row.values)) or "none"
    return DataError(
        f"{row.place} is in no known format (keys: {keys}){_what_is_wrong(row.values)}; expected one of:{forms}"
    )


def _what_is_wrong(values: dict[str, Any]) -> str:
    for key in TURN_LISTS:
        if key in values:
            given = "text" if isinstance(values[key], str) else f"a {type(values[key]).__name__}"
            given = "null" if values[key] is None else given
            return f': {key} is {given}, expected a list like [{{"role": "user", "content": "..."}}, ...]'
    for question, answer in (
        ("instruction", "output"),
        ("prompt", "completion"),
        ("question", "answer"),
    ):
        for has, lacks in ((question, answer), (answer, question)):
            if has in values and lacks not in values:
                return f": it has {has!r} but no {lacks!r}"
    if isinstance(values.get("text"), str):
        return ": it is a plain text, which `easyllm data build` packs for pretraining"
    return ""


def read_messages(
    values: list[Any], row: Row, *, turns: bool = False, name: str = ""
) -> list[Message]:
    """The turns of a list as messages, whichever form each is in.

    Args:
        turns: whether one that is in no form is called a wrong turn, not a wrong message.
        name: what errors call a turn, if not by its number.

    Keys of a turn beyond its form's own are kept: the template may read them (`reasoning_content`), or the loss mask
    (`weight`).
    """
    messages = [
        _read_any(turn, row, name or f"turn {number}", turns=turns)
        for number, turn in enumerate(values)
    ]
    messages = _merge_calls(messages, [_is_call(turn) for turn in values])
    for number, message in enumerate(messages):
        if isinstance(message, dict) and isinstance(message.get("role"), str):
            if not any(key in message for key in _SAYS):
                raise DataError(
                    f"{row.place}: message {number} has no text content; give content as a string"
                )
            role = message["role"]
            messages[number] = message | {"role": SHAREGPT_ROLES.get(role, role)}
    try:
        checked = normalise_messages(messages)
    except DataError as error:
        raise DataError(f"{row.place}: {error}") from None
    return [_with_training_keys(m, given) for m, given in zip(checked, messages, strict=True)]


def _read_any(turn: Any, row: Row, name: str, *, turns: bool) -> Any:
    """A turn of either form as a message; what is in no form stays as it is."""
    if _is_sharegpt(turn, turns):
        return read_turn(turn, row, name)
    if _is_call(turn):
        rest = {k: v for k, v in turn.items() if k not in ("role", "content")}
        return rest | read_function_call(turn.get("content"), row, name, turn["role"])
    return turn


def _merge_calls(messages: list[Any], is_call: list[bool]) -> list[Any]:
    """Messages in which turns of calls that follow each other (ms-swift has one for each) are one message of them all."""
    merged: list[Any] = []
    for number, message in enumerate(messages):
        follows = number > 0 and is_call[number - 1] and is_call[number]
        if follows and _but_calls(merged[-1]) == _but_calls(message):
            merged[-1] = message | {"tool_calls": merged[-1]["tool_calls"] + message["tool_calls"]}
        else:
            merged.append(message)
    return merged


def _is_call(turn: Any) -> bool:
    """Whether a turn is nothing but calls, by who speaks."""
    speaker = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
    is_named = isinstance(speaker, str) and speaker in CALL_ROLES
    return is_named and not turn.get("tool_calls")


def _but_calls(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "tool_calls"}


_SAYS = ("content", "tool_calls", "function_call", "refusal")


def _with_training_keys(message: Message, given: Message) -> Message:
    return message | {key: given[key] for key in TRAIN_KEYS if given.get(key) is not None}


def read_turn(turn: Any, row: Row, name: str) -> Message:
    """A ShareGPT turn, `{"from": ..., "value": ...}`; `name` is what errors call it."""
    turn = turn if isinstance(turn, dict) else {}
    speaker, value = turn.get("from"), turn.get("value", turn.get("content"))
    rest = {k: v for k, v in turn.items() if k not in ("from", "value", "content", "role")}
    if isinstance(speaker, str) and speaker in CALL_ROLES and value is not None:
        return rest | read_function_call(value, row, name, speaker)
    if not isinstance(value, str):
        raise DataError(f"{row.place}: {name} has no text value; give from and value")
    if speaker not in SHAREGPT_ROLES:
        raise DataError(
            f"{row.place}: {name} is from {speaker!r}; expected one of "
            f"{', '.join([*SHAREGPT_ROLES, *CALL_ROLES])}"
        )
    return rest | {"role": SHAREGPT_ROLES[speaker], "content": value}


def _is_sharegpt(turn: Any, by_default: bool) -> bool:
    if not isinstance(turn, dict):
        return by_default
    return "from" in turn or (by_default and "role" not in turn)


def _are_sharegpt(turns: list[Any]) -> bool:
    return bool(turns) and isinstance(turns[0], dict) and "from" in turns[0]


def read_turns(row: Row) -> list[Message]:
    """The system prompt and the turns of a row that holds a list of them."""
    key = turn_list(row.values)
    assert key is not None, "the format was detected by that list"
    messages = read_messages(row.values[key], row, turns=key == "conversations")
    return with_system(messages, row)


def with_system(messages: list[Message], row: Row) -> list[Message]:
    """The messages with the row's own system prompt before them.

    Raises:
        DataError: they begin with another one.
    """
    system = read_system(row)
    if not system or messages[:1] == system:
        return messages
    if messages and messages[0]["role"] == "system":
        raise DataError(
            f"{row.place} has two system prompts, under 'system' and in its first message; keep one of them"
        )
    return [*system, *messages]


def read_alpaca_prompt(row: Row) -> list[Message]:
    """An Alpaca row up to where the answer begins: system prompt, history, instruction and input."""
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
    """The row's `system` (or `system_prompt`) as a message, if there is one."""
    given = {key: row.values[key] for key in ("system", "system_prompt") if row.values.get(key)}
    for key, value in given.items():
        if not isinstance(value, str):
            raise DataError(f"{row.place}: {key} is a {type(value).__name__}, expected text")
    if len(set(given.values())) > 1:
        raise DataError(f"{row.place} has system and system_prompt, which differ; keep one of them")
    return [{"role": "system", "content": text} for text in list(given.values())[:1]]


def read_text(row: Row, key: str) -> str:
    """The text under `key`."""
    value = row.values[key]
    if not isinstance(value, str):
        raise DataError(f"{row.place}: {key} is a {type(value).__name__}, expected text")
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
        raise DataError(f"{row.place}: history is no list of pairs like [question, answer]")
    return pairs


_READERS: dict[str, Callable[[Row], list[Message]]] = {
    "messages": read_turns,
    "sharegpt": read_turns,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
    "question-answer": _question_answer,
}
