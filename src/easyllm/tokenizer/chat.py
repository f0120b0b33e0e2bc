"""Encoding conversations with a chat template, and the loss mask for training.

The text is rendered once and tokenized once. The loss mask is computed from the offsets of the same
tokens, so mask and ids cannot disagree. The trained tokens are everything that the template writes
for an assistant turn, from the end of its header (`turns`) through the token that ends the turn.
"""

import re
import secrets
from dataclasses import dataclass
from typing import Protocol

from easyllm.core.errors import ContextLengthError, DataError
from easyllm.core.json_types import JsonObject
from easyllm.tokenizer.loss_mask import end_turns, mask_of
from easyllm.tokenizer.messages import Message, normalise_messages, trained_turns
from easyllm.tokenizer.special_tokens import SpecialTokens
from easyllm.tokenizer.template import compile_with_visits
from easyllm.tokenizer.template_budget import Visit
from easyllm.tokenizer.turns import (
    Render,
    Span,
    TurnFinder,
    first_unrendered,
    spans_by_message,
    unrendered_calls,
)

Messages = list[Message]
Tools = list[JsonObject] | None
ROLES = ("system", "user", "assistant", "tool")
"""Roles that templates know. If a template omits the content of a message with one of these roles,
this is assumed to be intended, and the message is only counted."""


class TextEncoder(Protocol):
    """What encoding a chat needs of a tokenizer: implemented by `tokenizer.Tokenizer`."""

    special: SpecialTokens

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special (control) tokens."""

    @property
    def eos_id(self) -> int | None:
        """The id of the EOS token, or None."""

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Returns the token ids of `text`, with BOS and the like if `special_tokens`."""

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the ids without BOS or EOS, and for each id its character span in `text`."""


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """An encoded conversation.

    Attributes:
        token_ids: the token ids.
        mask: loss mask; `mask[t]` is whether token t is trained. None if it was not requested.
        text: the text that was tokenized.
        unrendered: indices of messages whose content the template did not render; empty if the
            check was not requested.
        untrained_calls: number of assistant turns that consist only of tool calls which the
            template does not render; the rendered turn is empty and therefore not trained.
    """

    token_ids: list[int]
    mask: list[bool] | None
    text: str
    unrendered: tuple[int, ...] = ()
    untrained_calls: int = 0


class ChatTemplate:
    """A compiled chat template.

    Messages may have any form that `normalise_messages` reads; they are normalised for rendering.

    Args:
        source: Jinja source, with or without `{% generation %}` marks.

    Attributes:
        source: the Jinja source.
        has_marks: whether the source contains `{% generation %}` marks.

    Raises:
        TemplateError: the source is not valid Jinja.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._render = compile_with_visits(source)
        self.has_marks = re.search(r"\{%[-+]?\s*generation\b", source) is not None

    def render(
        self,
        messages: Messages,
        *,
        tools: Tools = None,
        add_generation_prompt: bool = False,
        special: dict[str, str] | None = None,
    ) -> str:
        """Renders the conversation as text.

        Args:
            messages: the conversation.
            tools: definitions of the available tools.
            add_generation_prompt: whether to append the header of an assistant turn.
            special: further template variables (`bos_token`, `eos_token`, ...).

        Raises:
            DataError: the messages are malformed, or the template rejects them.
        """
        call = _Call(self, tools, special or {})
        return call(normalise_messages(messages), add_generation_prompt)[0]

    def encode(
        self,
        tokenizer: TextEncoder,
        messages: Messages,
        *,
        tools: Tools = None,
        add_generation_prompt: bool = False,
        with_mask: bool = False,
        num_prompt: int = 0,
        max_chars: int | None = None,
        find_unrendered: bool = False,
        reject_unrendered: bool = False,
    ) -> EncodedChat:
        """Encodes the conversation as token ids, optionally with the loss mask.

        Args:
            tokenizer: tokenizes the rendered text.
            messages: the conversation.
            tools: definitions of the available tools.
            add_generation_prompt: whether to append the header of an assistant turn; ignored with
                `with_mask`.
            with_mask: whether to compute the loss mask.
            num_prompt: number of messages at the beginning that are masked, whatever their role.
            max_chars: maximum number of characters of the rendered text.
            find_unrendered: whether to find messages whose content the template did not render.
            reject_unrendered: for prompts, whether it is an error if the template does not render
                the content of a message, except for assistant messages.

        Raises:
            DataError: the messages are malformed, the template rejects them, an assistant turn
                cannot be located in the text, the text has more than `max_chars` characters, or a
                message is not rendered (with `reject_unrendered` or, if its role is unknown, with
                `find_unrendered`).
        """
        is_trained = trained_turns(messages) if with_mask else []
        is_trained[:num_prompt] = [False] * len(is_trained[:num_prompt])
        messages = normalise_messages(messages)
        special = {
            f"{kind}_token": text
            for kind in ("bos", "eos", "pad", "unk")
            if (text := getattr(tokenizer.special, kind)) is not None
        }
        call = _Call(self, tools, special)
        text, visits = call(messages, add_generation_prompt and not with_mask)
        _refuse_long(text, max_chars)
        finder = TurnFinder(text, visits, messages, call)
        unrendered = _find_unrendered(finder, messages) if find_unrendered else ()
        if reject_unrendered:
            prompt = add_generation_prompt and not with_mask
            _reject_unrendered(text, visits, messages, lambda m, _: call(m, prompt))
        if not with_mask:
            ids = tokenizer.encode(text, special_tokens=False)
            return EncodedChat(ids, None, text, unrendered)
        empty = unrendered_calls(text, messages, _on(is_trained), call)
        for turn in empty:
            is_trained[turn] = False
        if self.has_marks:
            text, spans = _marked(call, messages, is_trained)
        else:
            spans = [finder.find(turn) for turn in _on(is_trained)]
        ids, offsets = tokenizer.encode_with_offsets(text)
        mask = mask_of(offsets, spans)
        if not self.has_marks:
            end_turns(text, ids, mask, offsets, spans, tokenizer)
        return EncodedChat(ids, mask, text, unrendered, len(empty))


class _Call:
    """A template together with the variables that are the same in every rendering."""

    def __init__(self, template: ChatTemplate, tools: Tools, special: dict[str, str]) -> None:
        self._template, self._tools, self._special = template, tools, special

    def __call__(
        self, messages: Messages, prompt: bool, marks: tuple[str, str] = ("", "")
    ) -> tuple[str, list[Visit]]:
        return self._template._render(
            messages=messages,
            tools=self._tools,
            documents=None,
            add_generation_prompt=prompt,
            __marks=marks,
            **self._special,
        )


def _on(is_trained: list[bool]) -> list[int]:
    return [turn for turn, is_on in enumerate(is_trained) if is_on]


def _find_unrendered(finder: TurnFinder, messages: Messages) -> tuple[int, ...]:
    """Returns the indices of messages whose content the template did not render.

    Raises:
        DataError: such a message has a role outside `ROLES`.
    """
    unrendered = finder.unrendered()
    for number in unrendered:
        if (role := messages[number]["role"]) not in ROLES:
            raise DataError(
                f"message {number} has the role {role!r}, which the chat template does not render; "
                f"give it one of {', '.join(ROLES)}, or remove it"
            )
    return tuple(unrendered)


def _reject_unrendered(text: str, visits: list[Visit], messages: Messages, render: Render) -> None:
    number = first_unrendered(text, visits, messages, render)
    if number is not None:
        raise DataError(
            f"message {number} has the role {messages[number]['role']!r}, whose content the "
            "model's chat template does not render; move it to a message with another role, or "
            "remove the message"
        )


def _marked(call: _Call, messages: Messages, is_trained: list[bool]) -> tuple[str, list[Span]]:
    """Returns the text and the spans between the generation marks of trained turns."""
    nonce = secrets.token_hex(8)  # prevents messages from forging a mark
    begin, end = f"\ue000{nonce}<", f"\ue000{nonce}>"
    raw, visits = call(messages, False, (begin, end))
    text, spans, start, position, positions = "", list[Span](), 0, 0, list[int]()
    for piece in re.split(f"({begin}|{end})", raw):
        if piece == begin:
            start = len(text)
            positions.append(position)
        elif piece == end:
            spans.append((start, len(text)))
        else:
            text += piece
        position += len(piece)
    answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    if all(is_trained[turn] for turn in answers):
        return text, spans
    turns = _turns_at(positions, visits)
    if None in turns:
        if len(spans) != len(answers):
            raise DataError(
                "some assistant turns are not trained, but the template's {% generation %} marks "
                "cannot be assigned to turns; write the marks inside the template's loop over the "
                "messages"
            )
        turns = list(answers)
    return text, [
        s for s, turn in zip(spans, turns, strict=True) if turn in answers and is_trained[turn]
    ]


def _turns_at(positions: list[int], visits: list[Visit]) -> list[int | None]:
    """Returns the index of the message being rendered at each position; None outside the loops."""
    written = spans_by_message(visits)
    return [next((t for t, (a, b) in written.items() if a <= p < b), None) for p in positions]


def _refuse_long(text: str, max_chars: int | None) -> None:
    if max_chars is not None and len(text) > max_chars:
        raise ContextLengthError(
            f"the conversation has {len(text)} characters, but the model's context fits at most "
            f"{max_chars}",
            "shorten it",
        )
