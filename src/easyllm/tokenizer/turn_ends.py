"""Finding the tokens that end an assistant turn under a chat template.

A model tuned on conversations learns to end its response with these tokens.
"""

from collections.abc import Iterator
from itertools import groupby

from easyllm.core.errors import DataError
from easyllm.core.json_types import JsonObject
from easyllm.tokenizer.tokenizer import Tokenizer

_TURNS: list[JsonObject] = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Ciao"},
]
_TOOLS: list[JsonObject] = [
    {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
]


def turn_end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the ids of the special tokens that end an assistant turn and are trained.

    They are determined from the loss mask of short conversations: the last trained token of each
    turn, if it is a special token, in the order of occurrence. There are several if a turn in the
    middle of a conversation ends differently from the last one (GLM-4's next role tag and its EOS).
    There are none without a chat template, or if the template ends turns with plain text.
    """
    if not tokenizer.template_sources:
        return ()
    found = [end for tools in (None, _TOOLS) for end in _ends(tokenizer, tools)]
    return tuple(dict.fromkeys(found))


def _ends(tokenizer: Tokenizer, tools: list[JsonObject] | None) -> Iterator[int]:
    for turns in (_TURNS, _TURNS[:2]):  # a template may accept only a single exchange
        try:
            chat = tokenizer.encode_chat(turns, tools=tools, with_mask=True)
        except DataError:
            continue
        assert chat.mask is not None, "the mask was requested"
        marked = groupby(zip(chat.token_ids, chat.mask, strict=True), key=lambda pair: pair[1])
        for trained, pairs in marked:
            last = _last_of([token for token, _ in pairs], tokenizer)
            if trained and last in tokenizer.special_ids | {tokenizer.eos_id}:
                yield last
        return


def _last_of(ids: list[int], tokenizer: Tokenizer) -> int:
    """Returns the last token, ignoring trailing whitespace (which the mask may include)."""
    while len(ids) > 1 and ids[-1] not in tokenizer.special_ids:
        if tokenizer.token_text(ids[-1]).strip():
            break
        ids.pop()
    return ids[-1]
