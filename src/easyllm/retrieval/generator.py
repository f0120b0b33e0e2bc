"""What answering needs of a language model: replies to messages, and how likely a text is."""

import math
from collections.abc import Sequence
from typing import Protocol

from easyllm.core.json_types import JsonObject
from easyllm.engine.llm import LLM
from easyllm.engine.params import SamplingParams


class Generator(Protocol):
    """A language model."""

    def reply(self, messages: list[JsonObject], max_tokens: int) -> str:
        """Returns the greedy reply to messages."""
        ...

    def mean_logprob(self, prompt: str, text: str) -> float:
        """Returns the mean log-probability, in nats, of the tokens of `text` after `prompt`."""
        ...

    def count(self, text: str) -> int:
        """Returns the number of tokens of a text."""
        ...

    @property
    def max_prompt_tokens(self) -> int:
        """Maximum number of tokens of a prompt."""
        ...

    @property
    def is_small(self) -> bool:
        """Whether the model has fewer parameters than `SMALL`."""
        ...


SMALL = 10**9
"""Parameters below which a model follows one short instruction better than a long one."""


class EngineGenerator:
    """A model of the engine.

    Args:
        llm: the engine, used from one thread at a time.
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    def reply(self, messages: list[JsonObject], max_tokens: int) -> str:
        """Returns the greedy reply to messages, without reasoning."""
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        text = self.llm.chat(messages, params).text
        return text.rpartition("</think>")[2].strip()

    def mean_logprob(self, prompt: str, text: str) -> float:
        """Returns the mean log-probability of `text` after `prompt`."""
        before = self.llm.encode(prompt)
        ids = self.llm.tokenizer.encode(text, special_tokens=False)
        scores = self.llm.score([*before, *ids])
        return sum(scores[-len(ids) :]) / len(ids)

    def count(self, text: str) -> int:
        """Returns the number of tokens of a text."""
        return len(self.llm.tokenizer.encode(text, special_tokens=False))

    @property
    def max_prompt_tokens(self) -> int:
        """Maximum number of tokens of a prompt."""
        return self.llm.engine.max_seq_len

    @property
    def is_small(self) -> bool:
        """Whether the model has fewer parameters than `SMALL`, by the shapes of its weights."""
        modules = self.llm.model.weight_modules()
        return sum(math.prod(module.storage.shape) for _, module in modules) < SMALL


def last_question(messages: Sequence[JsonObject]) -> str:
    """Returns the text of the last user message; empty if there is none."""
    for message in reversed(messages):
        if message.get("role") == "user":
            content = message.get("content")
            if isinstance(content, str):
                return content
            parts = content if isinstance(content, list) else []
            texts = [p["text"] for p in parts if isinstance(p, dict) and "text" in p]
            return "\n".join(texts)
    return ""


__all__ = ["EngineGenerator", "Generator", "last_question"]
