"""What rows that compare or label responses have in common: prompts, responses, their encoding."""

from collections.abc import Sequence

from easyllm.core.errors import DataError
from easyllm.core.json_types import Json, JsonObject
from easyllm.core.sequences import num_equal
from easyllm.corpus.files.row import Row
from easyllm.examples.conversations import (
    Conversation,
    read_conversation,
    read_messages,
    read_system,
    read_text,
    with_system,
)
from easyllm.examples.prepare import (
    Encoded,
    PreparationStats,
    TooLong,
    encode_messages,
    fit,
)
from easyllm.tokenizer.messages import Message
from easyllm.tokenizer.tokenizer import Tokenizer


def read_prompt(row: Row) -> list[Message]:
    """Returns the messages of a row's `prompt` or `question`, which is text or messages.

    Raises:
        DataError: it is neither; the message gives the row's location.
    """
    key = "prompt" if "prompt" in row.values else "question"
    if isinstance(row.values[key], list):
        return with_system(read_messages(row.values[key], row), row)
    return [*read_system(row), {"role": "user", "content": read_text(row, key)}]


def read_response(row: Row, value: Json, key: str) -> list[Message]:
    """Returns a response that is given as text, as a message or turn, or as a list of those.

    Args:
        value: the response.
        key: where it is in the row, for errors.

    Raises:
        DataError: it is none of these; the message gives the row's location.
    """
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    parts = value if isinstance(value, list) else [value]
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise DataError(
            f"{row.location}: {key} is not a response; give text, a message, or a list of messages"
        )
    return read_messages(parts, row, name=key)


def last_response(row: Row) -> tuple[list[Message], list[Message], Conversation]:
    """Returns the prompt and the last response of a row, and its conversation.

    Raises:
        DataError: the row is malformed, or its last message is not a response to a prompt.
    """
    conversation = read_conversation(row)
    messages, prompt = conversation.messages, row.values.get("prompt")
    start = len(messages) - 1
    if conversation.format == "prompt-completion" and isinstance(prompt, list):
        start = len(with_system(read_messages(prompt, row), row))
    if not is_response(messages[:start], messages[start:]):
        raise DataError(
            f"{row.location}: the label applies to the last message, which is from "
            f"{messages[start]['role'] if start < len(messages) else 'nobody'}; "
            "give a prompt followed by an assistant response"
        )
    return messages[:start], messages[start:], conversation


def is_response(prompt: list[Message], answer: list[Message]) -> bool:
    """Returns whether there is a prompt, and a response that starts with an assistant message."""
    return bool(prompt) and bool(answer) and answer[0]["role"] == "assistant"


def _has_text(message: Message) -> bool:
    """Returns whether a message says or calls anything."""
    content = message.get("content")
    said = content.strip() if isinstance(content, str) else content
    return bool(said or message.get("tool_calls"))


def encode_responses(
    prompt: list[Message],
    responses: Sequence[list[Message]],
    tools: list[JsonObject] | None,
    location: str,
    tokenizer: Tokenizer,
    account: PreparationStats,
    *,
    max_seq_len: int,
    overlong: TooLong = "cut",
) -> tuple[tuple[Encoded, ...], int] | None:
    """Encodes one or several responses to a prompt, and counts the row in `account`.

    Returns:
        One sequence per response, and the number of first ids that are the prompt of all; None if
        the row is dropped.

    Raises:
        DataError: the template rejects the messages, or the prompt has no text.
    """
    if not any(_has_text(message) for message in prompt):
        raise DataError(
            f"{location}: the prompt is empty; give the text that the responses answer, or remove "
            "the row"
        )
    account.rows += 1
    sequences = tuple(
        encode_messages([*prompt, *response], tools, location, tokenizer, num_prompt=len(prompt))
        for response in responses
    )
    account.note(*sequences)
    kept = fit(sequences, account, max_seq_len=max_seq_len, overlong=overlong)
    return None if kept is None else (kept, num_common(*kept))


def num_common(*sequences: Encoded) -> int:
    """Returns the length of the common prefix before the first trained id of any sequence.

    Of a single sequence it is everything before its first trained id.
    """
    first = min(list(encoded.mask).index(True, 1) for encoded in sequences)
    prompts = [encoded.token_ids[:first] for encoded in sequences]
    return min(num_equal(prompts[0], other) for other in prompts)


__all__ = [
    "encode_responses",
    "is_response",
    "last_response",
    "num_common",
    "read_prompt",
    "read_response",
]
