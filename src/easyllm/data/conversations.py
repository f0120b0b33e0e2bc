"""Rows of the usual formats as conversations in OpenAI's message form."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from easyllm.core.errors import DataError
from easyllm.data.rows import Row, read_rows

Message = dict[str, Any]
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
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
}
LABEL_KEYS = ("label", "kto_tag")
"""Keys whose true or false says whether an answer is good (TRL's name and LLaMA-Factory's)."""
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
    if isinstance(values.get("messages"), list):
        return "messages"
    if isinstance(values.get("conversations"), list):
        return "sharegpt"
    if "instruction" in values and "output" in values:
        return "alpaca"
    if "prompt" in values and "completion" in values:
        return "prompt-completion"
    if "question" in values and "answer" in values and not BESIDE_A_QUESTION & values.keys():
        return "question-answer"
    return None


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
        yield read_conversation(row)


def read_conversation(row: Row) -> Conversation:
    """One row as a conversation, whatever else the row says of it.

    Raises:
        DataError: the row is in no known format, or broken.
    """
    kind = detect_format(row.values)
    if kind is None:
        raise unknown_format(row, KNOWN_FORMS)
    messages = _READERS[kind](row)
    if not any(m.get("role") == "assistant" for m in messages):
        raise DataError(
            f"{row.place} has no assistant turn, so there is nothing to learn; add one or remove the row"
        )
    return Conversation(messages, read_tools(row), row.place, kind)


def unknown_format(row: Row, forms: str) -> DataError:
    """The error for a row that is in none of `forms`."""
    keys = ", ".join(sorted(row.values)) or "none"
    return DataError(f"{row.place} is in no known format (keys: {keys}); expected one of:{forms}")


def read_messages(values: list[Any], row: Row) -> list[Message]:
    """The messages, if each has a role and text or tool calls.

    Arguments of calls that are JSON text, as OpenAI's API has them, become objects, as templates expect them.
    """
    messages: list[Message] = []
    for number, message in enumerate(values):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{row.place}: message {number} has no role; give role and content")
        calls = message.get("tool_calls")
        if not isinstance(message.get("content"), str) and not calls:
            raise DataError(
                f"{row.place}: message {number} has no text content; give content as a string"
            )
        if calls:
            message = message | {"tool_calls": _read_calls(calls, row, f"message {number}")}
        messages.append(message)
    return messages


def read_turn(turn: Any, row: Row, name: str) -> Message:
    """A ShareGPT turn, `{"from": ..., "value": ...}`; `name` is what errors call it."""
    speaker = turn.get("from") if isinstance(turn, dict) else None
    value = turn.get("value") if isinstance(turn, dict) else None
    if not isinstance(value, str):
        raise DataError(f"{row.place}: {name} has no text value; give from and value")
    if speaker == "function_call":
        return _tool_call(value, row, name)
    if speaker not in SHAREGPT_ROLES:
        raise DataError(
            f"{row.place}: {name} is from {speaker!r}; expected one of "
            f"{', '.join([*SHAREGPT_ROLES, 'function_call'])}"
        )
    return {"role": SHAREGPT_ROLES[speaker], "content": value}


def read_sharegpt(row: Row) -> list[Message]:
    """The system prompt and the turns of a ShareGPT row."""
    turns = enumerate(row.values["conversations"])
    return [*read_system(row), *(read_turn(turn, row, f"turn {number}") for number, turn in turns)]


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
    """The row's `system` as a message, if there is one."""
    system = row.values.get("system")
    return [{"role": "system", "content": system}] if isinstance(system, str) and system else []


def read_text(row: Row, key: str) -> str:
    """The text under `key`."""
    value = row.values[key]
    if not isinstance(value, str):
        raise DataError(f"{row.place}: {key} is a {type(value).__name__}, expected text")
    return value


def read_tools(row: Row) -> list[dict[str, Any]] | None:
    """The tools a row offers, given as a list or as JSON text; None for none."""
    tools = row.values.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            raise DataError(f"{row.place}: tools is not JSON; give a list of functions") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(
        isinstance(tool, dict) and isinstance(tool.get("function", tool), dict) for tool in tools
    ):
        raise DataError(f"{row.place}: tools is no list of functions; give each as an object")
    return tools


def _messages(row: Row) -> list[Message]:
    return read_messages(row.values["messages"], row)


def _alpaca(row: Row) -> list[Message]:
    prompt = read_alpaca_prompt(row)
    return [*prompt, {"role": "assistant", "content": read_text(row, "output")}]


def _prompt_completion(row: Row) -> list[Message]:
    prompt, completion = row.values["prompt"], row.values["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return read_messages([*prompt, *completion], row)
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


def _read_calls(calls: Any, row: Row, name: str) -> list[dict[str, Any]]:
    """OpenAI's tool calls, `{"function": {"name": ..., "arguments": ...}}`, with their arguments as objects."""
    try:
        read = []
        for call in calls:
            function = call.get("function", call)
            if not isinstance(function["name"], str):
                raise TypeError
            if isinstance(arguments := function.get("arguments"), str):
                function = function | {"arguments": json.loads(arguments or "{}")}
            read.append(call | {"function": function} if "function" in call else function)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(
            f"{row.place}: {name} has tool_calls without name and JSON arguments; "
            'give a list like [{"function": {"name": "add", "arguments": {"a": 1}}}]'
        ) from None
    return read


def _tool_call(value: str, row: Row, name: str) -> Message:
    try:
        call = json.loads(value)
        calls = call if isinstance(call, list) else [call]
        functions = [{"name": c["name"], "arguments": c.get("arguments", {})} for c in calls]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(
            f"{row.place}: {name} is a function_call without name and arguments as JSON"
        ) from None
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": f} for f in functions],
    }


_READERS: dict[str, Callable[[Row], list[Message]]] = {
    "messages": _messages,
    "sharegpt": read_sharegpt,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
    "question-answer": _question_answer,
}
