"""Runs an evaluation task on a model; a killed run resumes from the responses on disk.

items ─▶ prompts ─▶ engine (responses) or forward passes (likelihoods) ─▶ outcomes ─▶ scores
                      │ each is appended to OUT/responses.jsonl, by a hash of its request
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from easyllm.adapters.base_fingerprint import fingerprint
from easyllm.core.config import first_difference
from easyllm.core.errors import ConfigError, DataError
from easyllm.core.json_types import JsonObject
from easyllm.core.progress import Progress
from easyllm.core.sandbox import run_sandboxed
from easyllm.engine.completion import Completion
from easyllm.engine.llm import LLM
from easyllm.engine.params import SamplingParams
from easyllm.engine.request import Request
from easyllm.evaluate.continuations import score_continuations
from easyllm.evaluate.metric import Outcome
from easyllm.evaluate.perplexity import perplexity
from easyllm.evaluate.reply_cache import ReplyCache, request_key
from easyllm.evaluate.task_config import TaskConfig
from easyllm.evaluate.task_items import Item, choices_of, fill, references_of
from easyllm.evaluate.task_prompts import PromptForm, check_form, encoded, final_text, plain_prompt
from easyllm.evaluate.text_perplexity import WORD
from easyllm.prompt.extract import LETTERS, extract

RESPONSES = "responses.jsonl"
SETTINGS = "settings.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRun:
    """The outcomes of a task.

    Attributes:
        items: the items.
        outcomes: what the model did with each.
        responses: the raw response of each (text, tokens, likelihoods).
        truncated, unparsed: numbers of responses that reached the maximum length, and of those
            without an answer of the wanted kind; the latter count as wrong.
        tokens: number of generated tokens.
        settings: model, prompt and sampling, which a score depends on.
    """

    items: list[Item]
    outcomes: list[Outcome]
    responses: list[JsonObject]
    truncated: int
    unparsed: int
    tokens: int
    settings: JsonObject


class TaskRunner:
    """A task on a model.

    Args:
        llm: the model.
        source: what the user calls it.
        task: the task.
        form: how items are asked.
        shots: the examples.
        params: sampling parameters; `max_tokens` and `stop` are the task's unless they are set.
        output: folder of the responses; None keeps them in memory.

    Raises:
        ConfigError: the form does not fit the model or task, or the folder is of another run.
    """

    def __init__(
        self,
        llm: LLM,
        source: str,
        task: TaskConfig,
        form: PromptForm,
        *,
        shots: Sequence[Item] = (),
        params: SamplingParams | None = None,
        output: Path | None = None,
    ) -> None:
        check_form(llm, task, form)
        self.llm, self.task, self.form, self.shots = llm, task, form, tuple(shots)
        params = params or SamplingParams(temperature=0)
        stop = params.stop or (() if form.chat else task.stop)
        self.params = params.model_copy(
            update={"max_tokens": params.max_tokens or task.max_tokens, "stop": stop}
        )
        self.settings = self._settings(source)
        self.cache = ReplyCache(self._checked(output), of=("a model's", "--output"))

    def run(self, items: Sequence[Item]) -> TaskRun:
        """Returns the outcomes of all items.

        Raises:
            ConfigError, DataError: a prompt does not fit into the context, or a row is invalid.
        """
        if self.task.kind == "text":
            responses = self._texts(items)
        elif self.form.likelihood:
            responses = self._likelihoods(items)
        else:
            responses = self._generated(items)
        pairs = list(zip(items, responses, strict=True))
        outcomes = [self._outcome(item, response) for item, response in pairs]
        generated = self.task.kind != "text" and not self.form.likelihood
        return TaskRun(
            items=list(items),
            outcomes=outcomes,
            responses=responses,
            truncated=sum(each.get("finish") == "length" for each in responses),
            unparsed=sum(o.answer is None and o.chosen is None for o in outcomes) * generated,
            tokens=sum(len(each.get("token_ids", ())) for each in responses),
            settings=self.settings,
        )

    def _settings(self, source: str) -> JsonObject:
        template = self.llm.tokenizer.chat_template
        text = template.source if template is not None and self.form.chat else ""
        task = self.task.model_dump(mode="json", exclude={"name", "metrics", "max_tokens", "stop"})
        prompt = [task, [shot.id for shot in self.shots], self.form.likelihood]
        return {
            "task": self.task.name,
            "model": source,
            "weights": _short(fingerprint(self.llm.model)),
            "dtype": str(self.llm.model.dtype).removeprefix("torch."),
            "formats": sorted(self.llm.model.packed_formats()),
            "tokenizer": self.llm.tokenizer.fingerprint[:16],
            "template_hash": _short(text) if text else None,
            "chat": self.form.chat,
            "prompt": self.task.prompt,
            "prompt_hash": _short(prompt),
            "shots": len(self.shots),
            "thinking": self.form.thinking,
            "choices": self._mode(),
            "sampling": self.params.model_dump(
                mode="json", include={"temperature", "seed", "max_tokens", "stop"}
            ),
        }

    def _mode(self) -> str | None:
        if self.task.kind != "choice":
            return None
        return "likelihood" if self.form.likelihood else "generated"

    def _checked(self, output: Path | None) -> Path | None:
        """Returns the file of the responses in a folder that is new, or of the same run."""
        if output is None:
            return None
        settings = output / SETTINGS
        if settings.is_file():
            try:
                there = json.loads(settings.read_text(encoding="utf-8"))
            except ValueError:
                raise DataError(f"{str(settings)!r} is not JSON; give a new folder") from None
            if difference := first_difference(there, self.settings):
                raise ConfigError(
                    f"{str(output)!r} holds another evaluation: {difference}; give a new folder"
                )
        else:
            check_run_folder(output)
        return output / RESPONSES

    def _key(self, prompt: object) -> str:
        return request_key({"settings": self.settings, "prompt": prompt})

    def _known(self, keys: Sequence[str]) -> list[JsonObject | None]:
        texts = [self.cache.get(key) for key in keys]
        return [None if text is None else json.loads(text) for text in texts]

    def _generated(self, items: Sequence[Item]) -> list[JsonObject]:
        """Returns the responses, those that are missing from the engine."""
        prompts = [encoded(self.llm, self.task, i, self.shots, self.form) for i in items]
        keys = [self._key(ids) for ids in prompts]
        found = self._known(keys)
        waiting = {}
        for number, known in enumerate(found):
            if known is None:
                seed = int(keys[number][:12], 16) ^ (self.params.seed or 0)
                params = self.params.model_copy(update={"seed": seed})
                waiting[number] = Request(prompt_ids=prompts[number], params=params)
        numbers = {request.id: number for number, request in waiting.items()}
        running = {number: Completion() for number in waiting}
        with Progress(self.task.name, total=len(items), unit="answer") as progress:
            progress.skip(len(items) - len(waiting))
            for event in self.llm.engine.run(waiting.values()):
                number = numbers[event.request_id]
                running[number].take(event)
                if event.finish_reason is None:
                    continue
                done = running.pop(number)
                found[number] = {
                    "text": done.text,
                    "token_ids": done.token_ids,
                    "finish": done.finish_reason,
                    "final": final_text(self.llm, prompts[number], done.token_ids, done.text),
                }
                self.cache.add(keys[number], json.dumps(found[number], ensure_ascii=False))
                progress.advance()
        return [each for each in found if each is not None]

    def _likelihoods(self, items: Sequence[Item]) -> list[JsonObject]:
        """Returns the log-probability of each choice, those that are missing from the model."""
        keys, requests, owners = list[str](), [], list[tuple[int, int]]()
        every = []
        for item in items:
            prompt = plain_prompt(self.task, item, self.shots, self.form)
            choices, _ = choices_of(self.task, item)
            pairs = [encode_pair(self.llm, prompt, self.task.delimiter + c) for c in choices]
            every.append(pairs)
            keys.append(self._key(pairs))
        found = self._known(keys)
        for number, known in enumerate(found):
            if known is None:
                requests += every[number]
                owners += [(number, choice) for choice in range(len(every[number]))]
        partial: dict[int, dict[int, float]] = {}
        with Progress(self.task.name, total=len(items), unit="item") as progress:
            progress.skip(len(items) - len({number for number, _ in owners}))
            for index, result in score_continuations(self.llm.model, requests):
                number, choice = owners[index]
                own = partial.setdefault(number, {})
                own[choice] = result.logprob
                if len(own) == len(every[number]):
                    found[number] = {"likelihoods": [own[c] for c in sorted(own)]}
                    self.cache.add(keys[number], json.dumps(found[number]))
                    progress.advance()
        return [each for each in found if each is not None]

    def _texts(self, items: Sequence[Item]) -> list[JsonObject]:
        """Returns the loss of each text."""
        keys = [self._key(item.fields["text"]) for item in items]
        found = self._known(keys)
        with Progress(self.task.name, total=len(items), unit="text") as progress:
            for number, item in enumerate(items):
                known = found[number]
                if known is None:
                    text = str(item.fields["text"])
                    its = perplexity(self.llm.model, self.llm.tokenizer, [text])
                    known = {
                        "nats": its.loss_nats * its.tokens,
                        "tokens": its.tokens,
                        "bytes": its.bytes,
                        "words": len(WORD.findall(text)),
                    }
                    self.cache.add(keys[number], json.dumps(known))
                found[number] = known
                progress.advance()
        return [each for each in found if each is not None]

    def _outcome(self, item: Item, response: JsonObject) -> Outcome:
        task = self.task
        if task.kind == "text":
            return Outcome(**response)
        if task.kind == "choice":
            choices, gold = choices_of(task, item)
            base = Outcome(gold=gold, choices=choices)
            if self.form.likelihood:
                return replace(base, likelihoods=tuple(response["likelihoods"]))
            final = response["final"]
            letter = extract("choice", final, num_choices=len(choices)) if final else None
            return replace(base, chosen=None if letter is None else LETTERS.index(letter))
        final = response["final"]
        answer = None if final is None else extract(task.extract, final)
        if task.program:
            return Outcome(answer=answer, passed=answer is not None and self._passes(item, answer))
        rights = [extract(task.extract, right) for right in references_of(task, item)]
        assert None not in rights, "read_items checks the references"
        return Outcome(answer=answer, references=tuple(r for r in rights if r is not None))

    def _passes(self, item: Item, answer: str) -> bool:
        program = fill(self.task.program, {**item.fields, "response": answer})
        return run_sandboxed(program).passed


def encode_pair(
    llm: LLM, context: str, continuation: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the token ids of a context and of its continuation, split as lm-eval splits them.

    White space at the end of the context belongs to the continuation, and both are encoded
    together, so that the tokens are those of the whole text.
    """
    bare = context.rstrip()
    whole = llm.tokenizer.encode(context + continuation)
    start = len(llm.tokenizer.encode(bare))
    if start == 0:
        first = llm.tokenizer.bos_id if llm.tokenizer.bos_id is not None else llm.tokenizer.eos_id
        return (first if first is not None else whole[0],), tuple(whole)
    return tuple(whole[:start]), tuple(whole[start:])


def check_run_folder(output: Path) -> None:
    """Checks that a folder is new, empty or an evaluation, before a model is loaded.

    Raises:
        ConfigError: it is something else.
    """
    if (output / SETTINGS).is_file() or not output.exists():
        return
    if not output.is_dir() or any(output.iterdir()):
        raise ConfigError(
            f"{str(output)!r} exists and is not an evaluation; give a new folder with --output"
        )


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


__all__ = ["RESPONSES", "SETTINGS", "TaskRun", "TaskRunner", "check_run_folder", "encode_pair"]
