"""The chat template: a conversation to token ids, and which of them are trained.

The text is rendered once and tokenized once; the loss mask is read off the offsets of those same tokens, so
mask and ids cannot disagree. What is trained: everything an assistant turn says, with the token that ends the turn.
"""

import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from easyllm.core.errors import ContextLengthError, DataError
from easyllm.tokenizer.template import compile_template

if TYPE_CHECKING:
    from easyllm.tokenizer.tokenizer import Tokenizer

Messages = list[dict[str, Any]]
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """Token ids of a conversation; `mask[t]` tells whether token t is trained (None when not asked for)."""

    token_ids: list[int]
    mask: list[bool] | None
    text: str


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: jinja, with or without `{% generation %}` marks.

    Raises:
        TemplateError: the source is not valid jinja.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._render = compile_template(source)
        self.has_marks = re.search(r"\{%[-+]?\s*generation\b", source) is not None

    def render(
        self,
        messages: Messages,
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        special: dict[str, str] | None = None,
    ) -> str:
        """The conversation as text."""
        return self._call(messages, tools, add_generation_prompt, special or {}, ("", ""))

    def encode(
        self,
        tokenizer: "Tokenizer",
        messages: Messages,
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        with_mask: bool = False,
        max_chars: int | None = None,
    ) -> EncodedChat:
        """The conversation as ids, with the loss mask if asked for.

        Raises:
            DataError: the template refuses the messages, an assistant turn cannot be found in its text, or the text has
                more than `max_chars` characters.
        """
        special = {
            f"{kind}_token": text
            for kind in ("bos", "eos", "pad", "unk")
            if (text := getattr(tokenizer.special, kind)) is not None
        }
        if not with_mask:
            text = self._call(messages, tools, add_generation_prompt, special, ("", ""))
            _refuse_long(text, max_chars)
            return EncodedChat(tokenizer.encode(text, special_tokens=False), None, text)
        if self.has_marks:
            text, spans = self._marked(messages, tools, special)
            _refuse_long(text, max_chars)
            ids, offsets = tokenizer.encode_with_offsets(text)
            return EncodedChat(ids, _mask(offsets, spans), text)
        text = self._call(messages, tools, False, special, ("", ""))
        _refuse_long(text, max_chars)
        spans = [
            self._find_turn(text, messages, turn, tools, special)
            for turn, message in enumerate(messages)
            if message.get("role") == "assistant"
        ]
        ids, offsets = tokenizer.encode_with_offsets(text)
        mask = _mask(offsets, spans)
        _end_turns(text, ids, mask, offsets, spans, tokenizer)
        return EncodedChat(ids, mask, text)

    def _call(
        self,
        messages: Messages,
        tools: list[dict[str, Any]] | None,
        prompt: bool,
        special: dict[str, str],
        marks: tuple[str, str],
    ) -> str:
        return self._render(
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=prompt,
            __marks=marks,
            **special,
        )

    def _marked(
        self, messages: Messages, tools: list[dict[str, Any]] | None, special: dict[str, str]
    ) -> tuple[str, list[Span]]:
        """Text and the spans between the template's generation marks."""
        nonce = secrets.token_hex(8)  # so that no message can forge a mark
        begin, end = f"\ue000{nonce}<", f"\ue000{nonce}>"
        raw = self._call(messages, tools, False, special, (begin, end))
        text, spans, start = "", [], 0
        for piece in re.split(f"({begin}|{end})", raw):
            if piece == begin:
                start = len(text)
            elif piece == end:
                spans.append((start, len(text)))
            else:
                text += piece
        return text, spans

    def _find_turn(
        self,
        text: str,
        messages: Messages,
        turn: int,
        tools: list[dict[str, Any]] | None,
        special: dict[str, str],
    ) -> Span:
        """Where assistant turn `turn` stands in `text`, without its header.

        A template mostly renders the first messages of a conversation the same whatever follows; then two
        shorter renderings give the turn's bounds. One that does not (it drops old reasoning, say) is
        probed: the turn's content is exchanged, and the turn lies where the text changes.
        """
        before = self._prefix(text, messages[:turn], tools, special, prompt=True)
        after = self._prefix(text, messages[: turn + 1], tools, special, prompt=False)
        if before is not None and after is not None and before <= after:
            return before, after
        found = self._probe(text, messages, turn, tools, special)
        if found is None:
            raise DataError(
                f"assistant turn {turn} cannot be found in what the chat template renders; "
                "put {% generation %} marks around the assistant's words in the template"
            )
        return found

    def _prefix(
        self,
        text: str,
        messages: Messages,
        tools: list[dict[str, Any]] | None,
        special: dict[str, str],
        *,
        prompt: bool,
    ) -> int | None:
        try:
            part = self._call(messages, tools, prompt, special, ("", ""))
        except DataError:  # a template may refuse a conversation cut short
            return None
        return len(part) if text.startswith(part) else None

    def _probe(
        self,
        text: str,
        messages: Messages,
        turn: int,
        tools: list[dict[str, Any]] | None,
        special: dict[str, str],
    ) -> Span | None:
        content = messages[turn].get("content")
        if not isinstance(content, str) or not content.strip():
            return None
        core = content.strip()
        # a character the content lacks, so that text and probe differ at the turn's first and last character
        probe = next(c for c in map(chr, range(ord("A"), 0x110000)) if c not in core) * 3
        changed = [*messages[:turn], {**messages[turn], "content": probe}, *messages[turn + 1 :]]
        other = self._call(changed, tools, False, special, ("", ""))
        start = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), None)
        if start is None:
            return None
        tail = next(
            i
            for i, (a, b) in enumerate(zip(reversed(text), reversed(other), strict=False))
            if a != b
        )
        return (start, len(text) - tail) if start <= len(text) - tail else None


def _refuse_long(text: str, max_chars: int | None) -> None:
    if max_chars is not None and len(text) > max_chars:
        raise ContextLengthError(
            f"the conversation has {len(text)} characters, the model's context holds at most {max_chars}; shorten it"
        )


def _mask(offsets: list[Span], spans: Iterable[Span]) -> list[bool]:
    """Which tokens overlap one of the spans."""
    mask = [False] * len(offsets)
    for start, end in spans:
        for index, (a, b) in enumerate(offsets):
            if (a < end and b > start) or (a == b and start <= a < end):
                mask[index] = True
    return mask


def _end_turns(
    text: str,
    ids: list[int],
    mask: list[bool],
    offsets: list[Span],
    spans: list[Span],
    tokenizer: "Tokenizer",
) -> None:
    """Makes each turn end with its end token: what a template writes behind it is not the assistant's.

    The end token is the last special token of the turn, if only blanks follow it there; where a turn has none,
    the special token right behind it ends it (templates whose next role tag ends the turn), and where nothing
    follows, an EOS is appended.
    """
    special = tokenizer.special_ids
    for start, end in spans:
        inside = [i for i, (a, b) in enumerate(offsets) if mask[i] and a >= start and b <= end]
        if not inside:
            continue
        ends = [i for i in inside if ids[i] in special]
        if ends and not text[offsets[ends[-1]][1] : end].strip():
            for i in inside:
                if i > ends[-1]:
                    mask[i] = False
            continue
        following = inside[-1] + 1
        if following < len(ids):
            if ids[following] in special:
                mask[following] = True
        elif tokenizer.eos_id is not None:
            ids.append(tokenizer.eos_id)
            mask.append(True)
            offsets.append((end, end))
