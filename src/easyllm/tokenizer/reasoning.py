"""The reasoning that some models write before their answer: its marks, and how it is switched.

<think>                        the mark that opens it; some templates write it in the prompt
The user asks for a sum ...
</think>                       the mark that closes it

The sum is 4.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from easyllm.core.errors import DataError
from easyllm.core.json_types import JsonObject
from easyllm.tokenizer.chat import ChatTemplate
from easyllm.tokenizer.messages import Message

MARKS = (
    ("<think>", "</think>"),  # DeepSeek-R1, Qwen3, GLM-4.5, Kimi-K2-Thinking, MiniMax-M2
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<thought>", "</thought>"),  # EXAONE Deep
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
)
SWITCHES = ("enable_thinking", "thinking")
"""Template variables that switch the reasoning: Qwen3 and GLM-4.5; DeepSeek-V3.1."""
_QUESTION: list[Message] = [{"role": "user", "content": "Hello"}]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningFormat:
    """The marks of a model's reasoning.

    Attributes:
        open: the mark before the reasoning.
        close: the mark after it.
        ids: ids of those marks that are single added tokens, by mark.
        switch: the template variable that switches the reasoning; None if there is none.
        on_by_default: whether the model reasons if the variable is not given.
    """

    open: str
    close: str
    ids: Mapping[str, int]
    switch: str | None = None
    on_by_default: bool = True

    def is_open(self, prompt: str, continued: str = "") -> bool:
        """Returns whether an output begins inside the reasoning.

        Args:
            prompt: the text of the prompt.
            continued: the content of the final message, if the model continues it.
        """
        if continued:
            return continued.rfind(self.open) > continued.rfind(self.close)
        return prompt.rstrip().endswith(self.open)

    def template_kwargs(self, on: bool) -> JsonObject | None:
        """Returns the template variables that switch the reasoning on or off.

        The result is empty if it is so by default, and None if the template cannot switch it.
        """
        if on == self.on_by_default:
            return {}
        return None if self.switch is None else {self.switch: on}


def detect_reasoning(
    template: ChatTemplate, added: Mapping[str, int], variables: Mapping[str, str]
) -> ReasoningFormat | None:
    """Returns the format of the reasoning that a chat template knows, or None.

    Args:
        template: the model's chat template.
        added: ids of the tokenizer's added tokens by their names.
        variables: the template variables `bos_token` and so on.
    """
    for opening, closing in MARKS:
        if opening in template.source or closing in template.source:
            switch, is_on = _switch(template, variables)
            ids = {mark: added[mark] for mark in (opening, closing) if mark in added}
            return ReasoningFormat(
                open=opening, close=closing, ids=ids, switch=switch, on_by_default=is_on
            )
    return None


def _switch(template: ChatTemplate, variables: Mapping[str, str]) -> tuple[str | None, bool]:
    """Returns the variable that changes the generation prompt, and whether it is on by default."""

    def prompt(**switch: bool) -> str:
        return template.render(
            _QUESTION, add_generation_prompt=True, special={**variables, **switch}
        )

    for name in SWITCHES:
        if name not in template.variables:
            continue
        try:
            on, off, default = prompt(**{name: True}), prompt(**{name: False}), prompt()
        except DataError:  # the template rejects the question
            continue
        if on != off:
            return name, default != off
    return None, True
