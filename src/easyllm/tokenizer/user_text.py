"""Disguising names of control tokens in the strings of a conversation before it is rendered.

A user's "hi<|im_end|>" must not end the user's turn. In each string of a conversation, the first
character of every name of a control token is replaced by a private-use character, so that neither
the template nor the tokenizer recognises the name; after rendering, `ControlTokens.encode` restores
the text. Because one character replaces one character, lengths and positions are those of the plain
text.

In assistant messages only special tokens are disguised: templates search their content for
`<think>`, `</think>` and `<tool_call>`, and write these themselves. The arguments of tool calls are
not searched, so every name in them is disguised.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from easyllm.core.errors import DataError
from easyllm.core.json_types import Json, JsonObject
from easyllm.tokenizer.control_tokens import ControlTokens

MAX_DEPTH = 200
"""Maximum nesting of the values in a conversation."""
REASONING_MARKS = frozenset(
    ["<think>", "</think>", "[THINK]", "[/THINK]", "<seed:think>", "</seed:think>"]
)
"""Names that an assistant's content may contain even where they are special tokens."""
_PRIVATE = range(0xE000, 0xF900)


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateInput:
    """What a request or a row of training data passes to a chat template.

    Attributes:
        messages: the conversation, normalised.
        tools: definitions of the available tools.
        variables: further template variables.
        originals: for each private-use character that disguises a name, the character it replaces.
    """

    messages: list[JsonObject]
    tools: list[JsonObject] | None = None
    variables: JsonObject
    originals: dict[str, str]

    def plain(self, text: str) -> str:
        """Returns a rendered text without the disguise."""
        return text.translate({ord(private): c for private, c in self.originals.items()})


def disguised(given: TemplateInput, tokens: ControlTokens, source: str) -> TemplateInput:
    """Returns the input with the names of control tokens disguised; the same if there are none.

    Args:
        given: the input, not disguised.
        tokens: the tokenizer's control tokens.
        source: the template; its characters are not used for the disguise.

    Raises:
        DataError: the values are nested too deeply, or use every private-use character.
    """
    first = set[str]()

    def note(text: str, positions: set[int]) -> str:
        first.update(text[position] for position in positions)
        return text

    _Walk(tokens, note).input(given)
    if not first:
        return given
    private = dict(zip(sorted(first), unused_characters(given, source), strict=False))
    if len(private) < len(first):
        raise DataError(
            "the messages contain names of control tokens, and every private-use character from "
            "U+E000 to U+F8FF; remove one of these characters"
        )

    def replace(text: str, positions: set[int]) -> str:
        if not positions:
            return text
        return "".join(private[c] if at in positions else c for at, c in enumerate(text))

    return _Walk(tokens, replace).input(given, {p: original for original, p in private.items()})


def unused_characters(given: TemplateInput, source: str) -> Iterator[str]:
    """Yields private-use characters that occur neither in the input nor in the template.

    Their escapes in JSON (`\\ue000`) do not occur either.
    """
    texts = [source]

    def collect(text: str, _: set[int]) -> str:
        texts.append(text)
        return text

    _Walk(None, collect).input(given)
    text = "\n".join(texts)
    used, lower = set(text), text.lower()
    for code in _PRIVATE:
        if chr(code) not in used and f"u{code:04x}" not in lower:
            yield chr(code)


class _Walk:
    """Calls a function for every string of an input, and builds the input of its results.

    Args:
        tokens: finds the positions that the function receives; None for no positions.
        change: receives a string and the positions of characters to replace; returns a string.
    """

    def __init__(
        self, tokens: ControlTokens | None, change: Callable[[str, set[int]], str]
    ) -> None:
        self._tokens, self._change = tokens, change

    def input(self, given: TemplateInput, originals: dict[str, str] | None = None) -> TemplateInput:
        return TemplateInput(
            messages=[self._message(message) for message in given.messages],
            tools=self._value(given.tools),
            variables=self._value(given.variables),
            originals=originals or {},
        )

    def _message(self, message: JsonObject) -> JsonObject:
        is_assistant = message["role"] == "assistant"
        return {
            self._text(key): self._text(value, parts=False)
            if key == "role"
            else self._value(value, is_assistant=is_assistant and key != "tool_calls")
            for key, value in message.items()
        }

    def _value(self, value: Json, depth: int = 0, *, is_assistant: bool = False) -> Json:
        if depth > MAX_DEPTH:
            raise DataError(
                f"a message or tool has values nested deeper than {MAX_DEPTH} levels; "
                "send them as text"
            )
        if isinstance(value, str):
            return self._text(value, is_assistant=is_assistant)
        if isinstance(value, dict):
            return {
                self._text(key): self._value(item, depth + 1, is_assistant=is_assistant)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._value(item, depth + 1, is_assistant=is_assistant) for item in value]
        return value

    def _text(self, text: Json, *, is_assistant: bool = False, parts: bool = True) -> Json:
        if not isinstance(text, str):  # a key of another type
            return text
        found = set[int]()
        if self._tokens is not None:
            found = self._tokens.positions(text, special_only=is_assistant, parts=parts)
            if is_assistant:
                found = {at for at in found if not text.startswith(tuple(REASONING_MARKS), at)}
        return self._change(text, found)
