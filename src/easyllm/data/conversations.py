"""Rows of the usual formats as conversations in OpenAI's message form."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyllm.core.errors import DataError
from easyllm.data.rows import Row, read_rows

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages (`role`, `content`, perhaps `tool_calls`), the tools offered, and the row's place."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    place: str


SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
}
KNOWN_FORMS = """
  messages           {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
  alpaca             {"instruction": "...", "input": "...", "output": "..."}
  sharegpt           {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
  prompt-completion  {"prompt": "...", "completion": "..."}"""


def detect_format(values: dict[str, Any]) -> str | None:
    """The name of the format a row is in, or None."""
    if isinstance(values.get("messages"), list):
        return "messages"
    if isinstance(values.get("conversations"), list):
        return "sharegpt"
    if "instruction" in values and "output" in values:
        return "alpaca"
    if "prompt" in values and "completion" in values:
        return "prompt-completion"
    return None


def read_conversations(path: Path) -> Iterator[Conversation]:
    """The conversations in a data file.

    Raises:
        DataError: a row is in no known format, or broken; its place is named.
    """
    yield from conversations(read_rows(path))


def conversations(rows: Iterable[Row]) -> Iterator[Conversation]:
    """Rows as conversations; each row's format is detected by its keys."""
    for row in rows:
        kind = detect_format(row.values)
        if kind is None:
            raise DataError(
                f"{row.place} is in no known format (keys: {', '.join(sorted(row.values)) or 'none'}); "
                f"expected one of:{KNOWN_FORMS}"
            )
        yield _READERS[kind](row)


def _messages(row: Row) -> Conversation:
    return _checked(_valid(row.values["messages"], row), row.values.get("tools"), row)


def _valid(messages: list[Any], row: Row) -> list[Message]:
    """The messages, if each has a role and text or tool calls."""
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{row.place}: message {number} has no role; give role and content")
        content = message.get("content")
        if not isinstance(content, str) and not message.get("tool_calls"):
            raise DataError(
                f"{row.place}: message {number} has no text content; give content as a string"
            )
    return messages


def _sharegpt(row: Row) -> Conversation:
    messages: list[Message] = []
    if isinstance(row.values.get("system"), str) and row.values["system"]:
        messages.append({"role": "system", "content": row.values["system"]})
    for number, turn in enumerate(row.values["conversations"]):
        speaker = turn.get("from") if isinstance(turn, dict) else None
        value = turn.get("value") if isinstance(turn, dict) else None
        if not isinstance(value, str):
            raise DataError(f"{row.place}: turn {number} has no text value; give from and value")
        if speaker == "function_call":
            messages.append(_tool_call(value, row, number))
        elif speaker in SHAREGPT_ROLES:
            messages.append({"role": SHAREGPT_ROLES[speaker], "content": value})
        else:
            raise DataError(
                f"{row.place}: turn {number} is from {speaker!r}; expected one of "
                f"{', '.join([*SHAREGPT_ROLES, 'function_call'])}"
            )
    return _checked(messages, row.values.get("tools"), row)


def _tool_call(value: str, row: Row, number: int) -> Message:
    try:
        call = json.loads(value)
        calls = call if isinstance(call, list) else [call]
        functions = [{"name": c["name"], "arguments": c.get("arguments", {})} for c in calls]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(
            f"{row.place}: turn {number} is a function_call without name and arguments as JSON"
        ) from None
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": f} for f in functions],
    }


def _alpaca(row: Row) -> Conversation:
    values = row.values
    messages: list[Message] = []
    if isinstance(values.get("system"), str) and values["system"]:
        messages.append({"role": "system", "content": values["system"]})
    for question, answer in _history(row):
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    text = _text(row, "instruction")
    if values.get("input"):
        text += "\n" + _text(row, "input")
    messages += [
        {"role": "user", "content": text},
        {"role": "assistant", "content": _text(row, "output")},
    ]
    return _checked(messages, None, row)


def _history(row: Row) -> list[list[str]]:
    pairs = row.values.get("history") or []
    if not isinstance(pairs, list) or any(
        not isinstance(pair, list) or [type(text) for text in pair] != [str, str] for pair in pairs
    ):
        raise DataError(f"{row.place}: history is no list of pairs like [question, answer]")
    return pairs


def _prompt_completion(row: Row) -> Conversation:
    prompt, completion = row.values["prompt"], row.values["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _checked(_valid([*prompt, *completion], row), row.values.get("tools"), row)
    messages = [
        {"role": "user", "content": _text(row, "prompt")},
        {"role": "assistant", "content": _text(row, "completion")},
    ]
    return _checked(messages, None, row)


def _text(row: Row, key: str) -> str:
    value = row.values[key]
    if not isinstance(value, str):
        raise DataError(f"{row.place}: {key} is a {type(value).__name__}, expected text")
    return value


def _checked(messages: list[Message], tools: Any, row: Row) -> Conversation:
    if not any(m.get("role") == "assistant" for m in messages):
        raise DataError(
            f"{row.place} has no assistant turn, so there is nothing to learn; add one or remove the row"
        )
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            raise DataError(f"{row.place}: tools is not JSON; give a list of functions") from None
    return Conversation(messages, tools or None, row.place)


_READERS: dict[str, Callable[[Row], Conversation]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
}
