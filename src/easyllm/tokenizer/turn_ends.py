"""Which tokens end an assistant's turn under a chat template: what a model tuned on conversations learns to stop with."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from easyllm.core.errors import DataError
from easyllm.tokenizer.tokenizer import Tokenizer

_TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Ciao"},
]
_TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
]


def turn_end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids of the control tokens that end an assistant's turn and are trained, in the order they are met.

    They are read off the loss mask of a short conversation: the last trained token of every turn, where it is a control
    token. Several where a turn ends otherwise in the middle of a conversation than at its end (GLM-4's next role tag and
    its EOS); none without a chat template, or where the template ends turns with plain text.
    """
    if not tokenizer.template_sources:
        return ()
    found = [end for tools in (None, _TOOLS) for end in _ends(tokenizer, tools)]
    return tuple(dict.fromkeys(found))


def _ends(tokenizer: Tokenizer, tools: list[dict[str, Any]] | None) -> Iterator[int]:
    for turns in (_TURNS, _TURNS[:2]):  # a template may take one exchange alone
        try:
            chat = tokenizer.encode_chat(turns, tools=tools, with_mask=True)
        except DataError:
            continue
        assert chat.mask is not None, "it was asked for"
        marked = groupby(zip(chat.token_ids, chat.mask, strict=True), key=lambda pair: pair[1])
        for trained, pairs in marked:
            last = _last_of([token for token, _ in pairs], tokenizer)
            if trained and last in tokenizer.special_ids | {tokenizer.eos_id}:
                yield last
        return


def _last_of(ids: list[int], tokenizer: Tokenizer) -> int:
    """The last token, blanks after it left out (a template's line break may be trained too)."""
    while len(ids) > 1 and ids[-1] not in tokenizer.special_ids:
        if tokenizer.token_text(ids[-1]).strip():
            break
        ids.pop()
    return ids[-1]
