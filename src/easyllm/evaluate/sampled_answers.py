"""Answers of a model to prompts, from the engine, each with a seed of its own.

The seed of an answer is a hash of the run's seed, the prompt's tokens and the answer's number, so
that it does not depend on the other prompts of a file, and more answers extend fewer.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from easyllm.core.json_types import JsonMapping
from easyllm.core.progress import Progress
from easyllm.engine.completion import Completion
from easyllm.engine.llm import LLM
from easyllm.engine.params import SamplingParams
from easyllm.engine.request import Request
from easyllm.evaluate.answer_store import CHUNK, AnswerStore, StoredAnswer
from easyllm.evaluate.prompt_rows import PromptRow


@dataclass(frozen=True, slots=True)
class SampledAnswer:
    """An answer to a prompt.

    Attributes:
        prompt: the prompt.
        text: the answer, without special tokens.
        token_ids: its tokens.
        truncated: whether it reached the maximum length.
    """

    prompt: PromptRow
    text: str
    token_ids: tuple[int, ...] = ()
    truncated: bool = False

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the answer."""
        return len(self.token_ids)

    @property
    def row(self) -> JsonMapping:
        """All keys of the prompt's row."""
        return self.prompt.row


def sample_answers(
    llm: LLM,
    prompts: Sequence[PromptRow],
    params: SamplingParams,
    *,
    n: int = 1,
    seed: int = 0,
    store: AnswerStore | None = None,
) -> list[list[SampledAnswer]]:
    """Returns `n` answers to each prompt.

    Args:
        llm: the model.
        prompts: the prompts.
        params: sampling parameters; `n` and `seed` are set for each answer.
        n: number of answers.
        seed: seed of all answers; the same seed gives the same answers.
        store: answers of an interrupted call, to which new ones are added; None samples all of them
            at once.

    Raises:
        ConfigError: the engine cannot serve a prompt.
        DataError: a prompt cannot be encoded by the chat template.
        OutputError: the store cannot be written.
    """
    answers: list[list[SampledAnswer]] = []
    size = len(prompts) if store is None else CHUNK
    with Progress("answering", total=n * len(prompts), unit="answer") as progress:
        for start in range(0, len(prompts), max(1, size)):
            part = prompts[start : start + size]
            found = None if store is None else store.get(start)
            if found is None:
                found = _sampled(llm, part, params, n, seed, progress)
                if store is not None:
                    store.add(start, found)
                    llm.engine.clear_prefix_cache()
            else:
                progress.skip(n * len(part))
            answers += [
                [SampledAnswer(prompt, *each) for each in group]
                for prompt, group in zip(part, found, strict=True)
            ]
    return answers


def _sampled(
    llm: LLM,
    prompts: Sequence[PromptRow],
    params: SamplingParams,
    n: int,
    seed: int,
    progress: Progress,
) -> list[list[StoredAnswer]]:
    """Returns text, tokens and truncation of `n` answers to each prompt."""
    requests, owners = [], {}
    for number, prompt in enumerate(prompts):
        ids = llm.encode_chat(prompt.messages, tools=prompt.tools)
        for sample in range(n):
            own = params.model_copy(update={"n": 1, "seed": _seed(seed, ids, sample)})
            request = Request(prompt_ids=tuple(ids), params=own)
            requests.append(request)
            owners[request.id] = number
    done = {request.id: Completion() for request in requests}
    for event in llm.engine.run(requests):
        if event.request_id in done:
            done[event.request_id].take(event)
            if event.finish_reason is not None:
                progress.advance()
    answers: list[list[StoredAnswer]] = [[] for _ in prompts]
    for request in requests:
        found = done[request.id]
        answers[owners[request.id]].append(
            (found.text, tuple(found.token_ids), found.finish_reason == "length")
        )
    return answers


def _seed(seed: int, ids: Sequence[int], sample: int) -> int:
    """Returns the seed of an answer, of 62 bits."""
    text = f"{seed} {sample} {','.join(map(str, ids))}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


__all__ = ["SampledAnswer", "sample_answers"]
