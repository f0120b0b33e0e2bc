"""Prompts: texts or token ids, one or several."""

from collections.abc import Sequence
from typing import cast

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


__all__ = ["Prompt", "as_prompts"]
