"""Asks a model in one batch: each question has a number of replies, each with a seed of its own."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from easyllm.core.errors import ConfigError
from easyllm.engine.completion import Completion
from easyllm.engine.llm import LLM
from easyllm.engine.params import SamplingParams
from easyllm.engine.request import Request
from easyllm.prompt.extract import without_reasoning


@dataclass(frozen=True, slots=True)
class Ask:
    """A question, and the beginning of the answer, which the model continues."""

    question: str
    begun: str = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply.

    Attributes:
        text: the reply, without its beginning that was given.
        tokens: number of its tokens.
        truncated: whether it reached the maximum length.
    """

    text: str
    tokens: int
    truncated: bool = False


class Asker(Protocol):
    """Answers questions; `ModelAsker` is the one with a model."""

    def __call__(
        self, asks: Sequence[Ask], *, n: int = 1, temperature: float = 0.0
    ) -> list[list[Reply]]:
        """Returns `n` replies to each question."""


@dataclass(slots=True)
class ModelAsker:
    """Asks a model through its engine.

    Attributes:
        llm: the model.
        max_tokens: tokens of a reply.
        seed: seed of all replies.
        chat: whether the model's chat template is used.
        system: system message; part of the text without a chat template.
        form: of a prompt without a chat template, with `{question}` and `{begun}`.
        stop: stop strings without a chat template.
        tokens: number of tokens generated so far, and `asked` prompts.
    """

    llm: LLM
    max_tokens: int = 256
    seed: int = 0
    chat: bool = True
    system: str = ""
    form: str = "Q: {question}\nA: {begun}"
    stop: tuple[str, ...] = ("\nQ:",)
    tokens: int = field(default=0, init=False)
    asked: int = field(default=0, init=False)

    def __call__(
        self, asks: Sequence[Ask], *, n: int = 1, temperature: float = 0.0
    ) -> list[list[Reply]]:
        """Returns `n` replies to each question; all are generated together.

        Raises:
            ConfigError: a prompt does not fit into the context; or several greedy replies, which
                would be equal, are asked for.
        """
        if n > 1 and not temperature:
            raise ConfigError(
                f"{n} replies at temperature 0 would all be equal; set a temperature above 0"
            )
        requests, owners = list[Request](), dict[int, int]()
        for number, ask in enumerate(asks):
            ids = self.encode(ask)
            for sample in range(n):
                params = SamplingParams(
                    temperature=temperature,
                    max_tokens=self.max_tokens,
                    seed=_seed(self.seed, ids, sample),
                    stop=() if self.chat else self.stop,
                )
                requests.append(Request(prompt_ids=ids, params=params))
                owners[requests[-1].id] = number
        done = {request.id: Completion() for request in requests}
        for event in self.llm.engine.run(requests):
            done[event.request_id].take(event)
        replies: list[list[Reply]] = [[] for _ in asks]
        for request in requests:
            found = done[request.id]
            text = without_reasoning(found.text, marks=self._marks) or ""
            replies[owners[request.id]].append(
                Reply(text, len(found.token_ids), found.finish_reason == "length")
            )
            self.tokens += len(found.token_ids)
        self.asked += len(requests)
        return replies

    @property
    def _marks(self) -> tuple[str, str]:
        reasoning = self.llm.tokenizer.reasoning
        return ("<think>", "</think>") if reasoning is None else (reasoning.open, reasoning.close)

    def encode(self, ask: Ask) -> tuple[int, ...]:
        """Returns the token ids of a prompt.

        White space at the end of what is begun is left out, because the model's tokens begin with
        it.
        """
        begun = ask.begun.rstrip()
        if not self.chat:
            text = self.form.replace("{question}", ask.question).replace("{begun}", begun)
            text = f"{self.system}\n\n{text}" if self.system else text
            return tuple(self.llm.tokenizer.encode(text.rstrip(" ")))
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages.append({"role": "user", "content": ask.question})
        if begun:
            messages.append({"role": "assistant", "content": begun})
        return tuple(self.llm.encode_chat(messages, continue_final_message=bool(begun)))


def _seed(seed: int, ids: Sequence[int], sample: int) -> int:
    text = f"{seed}/{list(ids)}/{sample}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


__all__ = ["Ask", "Asker", "ModelAsker", "Reply"]
