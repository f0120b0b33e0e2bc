"""Prompts to generate answers for, from rows of any supported form.

A `prompt` (or `question`, or `instruction`) is used as it is; of a conversation, everything before
its last response; of a preference pair, the prompt. All keys of a row reach rule rewards.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from easyllm.core.errors import DataError
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.corpus.files.row import Row
from easyllm.examples.conversations import read_alpaca_prompt, read_turns, row_kind, turn_list
from easyllm.examples.data_file import read_rows
from easyllm.examples.preferences import preference
from easyllm.examples.responses import read_prompt
from easyllm.examples.tools import read_tools
from easyllm.tokenizer.messages import Message

_FORMS = (
    '{"prompt": "..."}, {"prompt": [messages]}, {"question": "..."}, {"instruction": "..."}, '
    '{"messages": [...]} or a preference pair'
)


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt.

    Attributes:
        messages: the conversation that an answer continues.
        tools: the tools that it offers.
        row: all keys of its row.
        location: location of the row.
    """

    messages: list[Message]
    tools: list[JsonObject] | None
    row: JsonMapping
    location: str


def read_prompts(path: Path, *, limit: int | None = None) -> list[PromptRow]:
    """Returns the prompts of a file.

    Args:
        path: a .json or .jsonl file.
        limit: number of rows to read; by default all.

    Raises:
        DataError: the file cannot be read, or a row has no prompt; the message gives its location.
    """
    return list(islice(_prompts(path), limit))


def _prompts(path: Path) -> Iterator[PromptRow]:
    for row in read_rows(path):
        messages = _messages(row)
        if messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not any(message["role"] == "user" for message in messages):
            raise DataError(f"{row.location} has no user's message to answer; add one")
        yield PromptRow(messages, read_tools(row), row.values, row.location)


def _messages(row: Row) -> list[Message]:
    values = row.values
    if row_kind(values) == "preference":
        return preference(row).prompt
    if turn_list(values) is not None:
        return read_turns(row)
    if "instruction" in values:
        return read_alpaca_prompt(row)
    if "prompt" in values or "question" in values:
        return read_prompt(row)
    keys = ", ".join(sorted(values)) or "none"
    raise DataError(f"{row.location} has no prompt (keys: {keys}); expected one of: {_FORMS}")


__all__ = ["PromptRow", "read_prompts"]
