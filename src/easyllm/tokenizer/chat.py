"""Encoding conversations with a chat template, and the loss mask for training.

The text is rendered once and tokenized once. The loss mask is computed from the offsets of the same
tokens, so mask and ids cannot disagree. The trained tokens are everything that the template writes
for an assistant turn, from the end of its header (`turns`) through the token that ends the turn.
Names of control tokens in the messages are encoded as ordinary text (`user_text`).
"""

import re
import secrets
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from easyllm.core.errors import ContextLengthError, DataError
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.tokenizer.argument_text import as_text, needs_text
from easyllm.tokenizer.continuation import cut_at_mark, with_final_mark
from easyllm.tokenizer.control_tokens import ControlTokens
from easyllm.tokenizer.loss_mask import end_turns, mask_of
from easyllm.tokenizer.messages import Message, normalise_messages, trained_turns
from easyllm.tokenizer.special_tokens import SpecialTokens
from easyllm.tokenizer.template import compile_with_visits, variables_of
from easyllm.tokenizer.template_budget import Visit
from easyllm.tokenizer.template_variables import checked_variables
from easyllm.tokenizer.turns import (
    Render,
    Span,
    TurnFinder,
    first_unrendered,
    spans_by_message,
    unrendered_calls,
)
from easyllm.tokenizer.user_text import TemplateInput, disguised

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

    @property
    def longest_token(self) -> int:
        """Length in characters of the longest token."""

    @property
    def control_tokens(self) -> ControlTokens:
        """The control tokens, whose names in messages are ordinary text."""

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
        self._needs_argument_text: bool | None = None  # not known yet
        self.has_marks = re.search(r"\{%[-+]?\s*generation\b", source) is not None

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names of the variables that the template reads, such as `tools` or `enable_thinking`."""
        return variables_of(self.source)

    def render(
        self,
        messages: Messages,
        *,
        tools: Tools = None,
        add_generation_prompt: bool = False,
        special: JsonMapping | None = None,
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
        messages = self._with_arguments(normalise_messages(messages), special or {})
        given = TemplateInput(messages=messages, tools=tools, variables={}, originals={})
        return _Call(self, given, dict(special or {}))(messages, add_generation_prompt)[0]

    def encode(
        self,
        tokenizer: TextEncoder,
        messages: Messages,
        *,
        tools: Tools = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        template_kwargs: JsonMapping | None = None,
        with_mask: bool = False,
        num_prompt: int = 0,
        max_tokens: int | None = None,
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
            continue_final_message: whether the text ends with the content of the last message,
                an assistant's, which the model continues; not with `add_generation_prompt` or
                `with_mask`.
            template_kwargs: further variables of the template (`enable_thinking`, for example);
                plain JSON.
            with_mask: whether to compute the loss mask.
            num_prompt: number of messages at the beginning that are masked, whatever their role.
            max_tokens: rejects, before it is encoded, a text with more characters than this many
                of the longest token.
            find_unrendered: whether to find messages whose content the template did not render.
            reject_unrendered: for prompts, whether it is an error if the template does not render
                the content of a message, except for assistant messages.

        Raises:
            DataError: the messages are malformed, the template rejects them or does not read one
                of `template_kwargs`, the last message cannot be continued, an assistant turn
                cannot be located in the text, or a message is not rendered (with
                `reject_unrendered` or, if its role is unknown, with `find_unrendered`).
            ContextLengthError: the text is too long for `max_tokens`.
        """
        prompt = add_generation_prompt and not with_mask
        if continue_final_message and (prompt or with_mask):
            raise DataError(
                "continue_final_message ends the text inside the last message, so it excludes "
                "add_generation_prompt and a loss mask; choose one of them"
            )
        is_trained = trained_turns(messages) if with_mask else []
        is_trained[:num_prompt] = [False] * len(is_trained[:num_prompt])
        given = self._input(tokenizer, messages, tools, template_kwargs)
        mark = ""
        if continue_final_message:
            given, mark = with_final_mark(given, self.source)
        messages = given.messages
        call = _Call(self, given, token_variables(tokenizer))
        text, visits = call(messages, prompt)
        refuse_long(text, tokenizer, max_tokens)
        finder = TurnFinder(text, visits, messages, call)
        unrendered = _find_unrendered(finder, messages) if find_unrendered else ()
        if reject_unrendered:
            _reject_unrendered(text, visits, messages, lambda m, _: call(m, prompt))
        if mark:
            text = cut_at_mark(text, mark)
        if not with_mask:
            ids = _ids(tokenizer, text, given)
            return EncodedChat(ids, None, given.plain(text), unrendered)
        empty = unrendered_calls(text, messages, _on(is_trained), call)
        for turn in empty:
            is_trained[turn] = False
        if self.has_marks:
            text, spans = _marked(call, messages, is_trained)
        else:
            spans = [finder.find(turn) for turn in _on(is_trained)]
        ids, offsets = _ids_with_offsets(tokenizer, text, given)
        mask = mask_of(offsets, spans)
        if not self.has_marks:
            end_turns(text, ids, mask, offsets, spans, tokenizer)
        return EncodedChat(ids, mask, given.plain(text), unrendered, len(empty))

    def _input(
        self,
        tokenizer: TextEncoder,
        messages: Messages,
        tools: Tools,
        template_kwargs: JsonMapping | None,
    ) -> TemplateInput:
        """Returns the template's input, with the names of control tokens in it disguised."""
        variables = checked_variables(template_kwargs, self.variables) if template_kwargs else {}
        messages = self._with_arguments(normalise_messages(messages), token_variables(tokenizer))
        given = TemplateInput(messages=messages, tools=tools, variables=variables, originals={})
        return disguised(given, tokenizer.control_tokens, self.source)

    def _with_arguments(self, messages: Messages, special: JsonMapping) -> Messages:
        """Returns the messages with arguments of calls in the form that the template writes."""
        if not any(message.get("tool_calls") for message in messages):
            return messages
        if self._needs_argument_text is None:
            bare = TemplateInput(messages=[], variables={}, originals={})
            call = _Call(self, bare, dict(special))
            self._needs_argument_text = needs_text(lambda given: call(given, False)[0])
        return as_text(messages) if self._needs_argument_text else messages


class _Call:
    """A template together with the variables that are the same in every rendering."""

    def __init__(self, template: ChatTemplate, given: TemplateInput, special: JsonObject) -> None:
        self._template, self._given, self._special = template, given, special

    def __call__(
        self, messages: Messages, prompt: bool, marks: tuple[str, str] = ("", "")
    ) -> tuple[str, list[Visit]]:
        return self._template._render(
            messages=messages,
            tools=self._given.tools,
            add_generation_prompt=prompt,
            __marks=marks,
            __disguise="".join(self._given.originals),
            **self._special,
            **{"documents": None, **self._given.variables},
        )


def token_variables(tokenizer: TextEncoder) -> JsonObject:
    """Returns the template variables `bos_token`, `eos_token` and so on."""
    return {
        f"{kind}_token": text
        for kind in ("bos", "eos", "pad", "unk")
        if (text := getattr(tokenizer.special, kind)) is not None
    }


def _ids(tokenizer: TextEncoder, text: str, given: TemplateInput) -> list[int]:
    if not given.originals:
        return tokenizer.encode(text, special_tokens=False)
    return tokenizer.control_tokens.encode_ids(text, given.originals)


def _ids_with_offsets(
    tokenizer: TextEncoder, text: str, given: TemplateInput
) -> tuple[list[int], list[Span]]:
    """Returns the ids of a rendered text, with the disguise removed, and their spans."""
    if not given.originals:
        return tokenizer.encode_with_offsets(text)
    return tokenizer.control_tokens.encode(text, given.originals)


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


def refuse_long(
    text: str, tokenizer: TextEncoder, max_tokens: int | None, *, what: str = "conversation"
) -> None:
    """Refuses, before it is encoded, a text that certainly has more tokens than allowed.

    Args:
        text: the text.
        tokenizer: the tokenizer.
        max_tokens: maximum number of tokens; None sets no bound.
        what: what the text is, for the error.

    Raises:
        ContextLengthError: it has more characters than so many of the longest token.
    """
    if max_tokens is None or len(text) <= max_tokens:  # no need to look for the longest token
        return
    max_chars = max_tokens * tokenizer.longest_token
    if len(text) > max_chars:
        raise ContextLengthError(
            f"the {what} has {len(text)} characters, but the model's context fits at most "
            f"{max_chars}",
            "shorten it",
        )
