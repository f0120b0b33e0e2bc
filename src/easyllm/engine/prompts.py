"""Prompts: texts or token ids, one or several."""

from collections.abc import Sequence
from typing import cast

from easyllm.core.json_types import JsonObject

Prompt = str | Sequence[int]
"""A text, or its token ids."""


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Returns several prompts as a list, and one prompt as a list of one.

    A text alone would otherwise be taken for a sequence of prompts of one character.
    """
    if isinstance(prompts, str):
        return [prompts]
    if len(prompts) and isinstance(prompts[0], int):
        return [cast("Sequence[int]", prompts)]
    return list(cast("Sequence[Prompt]", prompts))


def with_system(messages: list[JsonObject], text: str) -> list[JsonObject]:
    """Returns a conversation that begins with a system message: its own, or else `text`.

    >>> with_system([{"role": "user", "content": "Hi"}], "Be brief.")[0]["content"]
    'Be brief.'
    """
    if not text or (messages and messages[0].get("role") in ("system", "developer")):
        return messages
    return [{"role": "system", "content": text}, *messages]


__all__ = ["Prompt", "as_prompts", "with_system"]
