"""Normalising chat messages from any API, dataset or client to the form chat templates expect.

Templates handle other forms inconsistently: Qwen3's drops a list of text parts, Llama 3's writes a
null content as "None", and `arguments | tojson` encodes arguments given as JSON text a second time.
Therefore every conversation passes through `normalise_messages` before it is rendered: rows of
training data, `encode_chat`, and requests to the server.

    {"role": "developer", ...}                            role "system"
    {"role": "function", ...}                             role "tool" (the result of a tool call)
    {"content": [{"type": "text", "text": "a"}, ...]}     the texts of the parts, joined with "\\n"
    {"content": null}, {"refusal": "I cannot."}           "", and the refusal as the content
    {"tool_calls": [{"function": {"arguments": "{}"}}]}   the arguments as an object
    {"function_call": {...}}                              a list with one tool call
"""

import json
from collections.abc import Mapping, Sequence

from easyllm.core.errors import DataError
from easyllm.core.json_types import Json, JsonMapping, JsonObject

Message = JsonObject
ROLE_ALIASES = {"developer": "system", "function": "tool"}
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Type of a content part -> key of its text (OpenAI's Chat Completions and Responses APIs)."""
TRAIN_KEYS = (
    *("weight", "train", "training", "trainable"),
    *("loss", "loss_mask", "loss_weight", "loss_scale", "mask"),
)
"""Loss-masking keys of a message in the formats of OpenAI, Mistral, axolotl and ms-swift: 0 masks
the message."""
PART_KEYS = ("train_detail", "training_detail")
"""Keys with which axolotl masks character ranges of a message; they are not supported."""
MEDIA_KEYS = ("images", "image", "videos", "video", "audios", "audio", "files")
"""Keys under which some formats store non-text content of a message."""
CALL_EXAMPLE = '[{"function": {"name": "add", "arguments": {"a": 1}}}]'


def normalise_messages(messages: Sequence[JsonMapping]) -> list[Message]:
    """Returns new messages in the form that chat templates expect; the input is not changed.

    Each message has a role and a string as content. Keys that are null or used only for training
    (`TRAIN_KEYS`) are dropped; all others (`name`, `tool_call_id`, `reasoning_content`, ...) are
    kept for the template. The function is idempotent.

    Raises:
        DataError: a message is not an object with a role; its content is not text (an image, for
            example); it masks only a part of its content (`PART_KEYS`); or a tool call has no name,
            or has arguments that are not JSON.

    >>> content = [{"type": "text", "text": "Be terse."}]
    >>> normalise_messages([{"role": "developer", "content": content, "name": None}])
    [{'role': 'system', 'content': 'Be terse.'}]
    """
    return [_normalised(message, number) for number, message in enumerate(messages)]


def trained_turns(messages: Sequence[JsonMapping]) -> list[bool]:
    """Returns for each message whether it is trained.

    Assistant messages are trained, except those with `weight: 0` (or another key in `TRAIN_KEYS`).

    Raises:
        DataError: such a key has a value other than 0, 1, true, false or null; two such keys
            contradict each other; or a message with another role is marked as trained.
    """
    return [_is_trained(message, number) for number, message in enumerate(messages)]


def _normalised(message: object, number: int) -> Message:
    name = f"message {number}"
    if not isinstance(message, Mapping):
        raise DataError(
            f"{name} has no role: it is a {type(message).__name__}; "
            "give an object with role and content"
        )
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise DataError(f"{name} has no role; give role and content")
    for key in MEDIA_KEYS:
        if message.get(key):
            raise DataError(
                f"{name} has {key}; only text is supported, not images, audio, video or files: "
                "remove them"
            )
    for key in PART_KEYS:
        if message.get(key):
            raise DataError(
                f"{name} has {key}, but parts of a message cannot be masked; split the message, or "
                "mask all of it with weight 0"
            )
    kept = {
        key: value
        for key, value in message.items()
        if value is not None
        and key not in PART_KEYS
        and key not in TRAIN_KEYS
        and key not in ("refusal", "function_call")
    }
    content = _text(message.get("content"), name)
    refusal = message.get("refusal")
    if refusal:
        if not isinstance(refusal, str):
            raise DataError(f"{name}: refusal is a {type(refusal).__name__}, expected text")
        content = f"{content}\n{refusal}" if content else refusal
    kept |= {"role": ROLE_ALIASES.get(role, role), "content": content}
    calls = message.get("tool_calls")
    if not calls and message.get("function_call"):
        calls = [message["function_call"]]
    kept.pop("tool_calls", None)
    if calls:
        kept["tool_calls"] = read_calls(calls, name)
    return kept


def _text(content: object, name: str) -> str:
    """Returns a message's content as one string."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list | tuple):
        raise DataError(
            f"{name} has content of type {type(content).__name__}, "
            "expected text or a list of text parts"
        )
    return "\n".join(_part_text(part, name) for part in content)


def _part_text(part: object, name: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    text = part.get(TEXT_PARTS[kind]) if isinstance(part, Mapping) and kind in TEXT_PARTS else None
    if isinstance(text, str):
        return text
    if kind in TEXT_PARTS:
        raise DataError(
            f"{name} has a part of type {kind!r} without text; "
            'give {"type": "text", "text": "..."}'
        )
    raise DataError(
        f"{name} has a part of type {kind!r}; only text is supported, not images, audio, video or "
        "files: give only text parts"
    )


def read_calls(calls: Json, name: str) -> list[JsonObject]:
    """Returns tool calls in OpenAI's format, with their arguments as objects.

    A call without the enclosing `function` object is wrapped in one.

    Args:
        calls: tool calls, `{"function": {"name": ..., "arguments": ...}}`.
        name: name of the message for error texts.

    Raises:
        DataError: a call has no name, or arguments that are not JSON.
    """
    try:
        return [_read_call(call) for call in calls]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(
            f"{name} has tool_calls without name and JSON arguments; "
            f"give a list like {CALL_EXAMPLE}"
        ) from None


def read_arguments(arguments: object) -> Json:
    """Returns the arguments of a tool call as a value.

    JSON text is decoded, even if it was encoded several times; empty or missing arguments are `{}`.

    Raises:
        ValueError: the text is not JSON.

    >>> read_arguments('"{\\\\"a\\\\": 1}"'), read_arguments(""), read_arguments({"a": 1})
    ({'a': 1}, {}, {'a': 1})
    """
    while isinstance(arguments, str):
        arguments = json.loads(arguments) if arguments.strip() else {}
    return {} if arguments is None else arguments


def _read_call(call: Json) -> JsonObject:
    function = call.get("function", call)
    if not isinstance(function["name"], str):
        raise TypeError
    function = {**function, "arguments": read_arguments(function.get("arguments"))}
    if "function" in call:
        return {**call, "function": function}
    kept = {key: function.pop(key) for key in ("id", "type") if key in function}
    return {"type": "function", **kept, "function": function}


def _is_trained(message: JsonMapping, number: int) -> bool:
    is_assistant = message.get("role") == "assistant"
    given = {key: message[key] for key in TRAIN_KEYS if message.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise DataError(
                f"message {number} has {key} {value!r}; a message is either trained or masked: "
                "give 1 or 0 (true or false)"
            )
    if len({bool(value) for value in given.values()}) > 1:
        raise DataError(
            f"message {number} has {_listed(given)}, which contradict each other; keep one of them"
        )
    if given and any(given.values()) and not is_assistant:
        raise DataError(
            f"message {number} is from {message.get('role')!r} and has {_listed(given)}; only "
            "assistant messages are trained: remove the key, or train on every token "
            "(train_on: all)"
        )
    return is_assistant and all(given.values())


def _listed(given: JsonObject) -> str:
    return " and ".join(f"{key} {value!r}" for key, value in given.items())
