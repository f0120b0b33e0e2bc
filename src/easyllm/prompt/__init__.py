"""Prompts and answers: structured prompts, methods of reasoning, the reader of answers.

Exports are imported lazily: structured prompts need no torch.
"""

from typing import TYPE_CHECKING

from easyllm.core.lazy import lazy_exports

if TYPE_CHECKING:
    from easyllm.prompt.ask import Ask, ModelAsker
    from easyllm.prompt.library import load_prompt
    from easyllm.prompt.reasoning import Example, Reasoned, reason
    from easyllm.prompt.structured import StructuredPrompt, parse, render, to_markdown

__all__ = [
    "Ask",
    "Example",
    "ModelAsker",
    "Reasoned",
    "StructuredPrompt",
    "load_prompt",
    "parse",
    "reason",
    "render",
    "to_markdown",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "Ask": "easyllm.prompt.ask",
        "Example": "easyllm.prompt.reasoning",
        "ModelAsker": "easyllm.prompt.ask",
        "Reasoned": "easyllm.prompt.reasoning",
        "StructuredPrompt": "easyllm.prompt.structured",
        "load_prompt": "easyllm.prompt.library",
        "parse": "easyllm.prompt.structured",
        "reason": "easyllm.prompt.reasoning",
        "render": "easyllm.prompt.structured",
        "to_markdown": "easyllm.prompt.structured",
    },
)
