"""An LLM judge that compares answers pairwise (Zheng et al. 2023, arXiv 2306.05685).

Every pair is judged in both orders, because judges prefer a position (section 3.3). A pair has a
winner if both orders agree on it, else it is a tie, so that a pure preference for a position gives
ties only. The judge's form of reply is enforced by its server (`response_format` with a JSON
Schema); a server that refuses this is asked for text with the verdict in the last line.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from easyllm.core.json_types import JsonObject
from easyllm.core.progress import Progress
from easyllm.evaluate.comparisons import Comparison, Judged
from easyllm.evaluate.judge_client import JudgeClient, Refused
from easyllm.evaluate.judge_config import JudgeConfig
from easyllm.evaluate.judge_prompt import (
    Form,
    conversation_text,
    judge_messages,
    parse_verdict,
    verdict_schema,
)
from easyllm.evaluate.reply_cache import ReplyCache, request_key

NOT_SUPPORTED = (400, 404, 415, 422, 501)
"""Statuses with which servers refuse a `response_format` that they do not support."""


class Judge:
    """Compares answers with a model that has OpenAI's chat completions API, greedily.

    Args:
        config: address and options.
        key: the API key; never written to a file.
        cache: file of the replies so far; None keeps them in memory only.
        client: sends the requests; by default one for `config.url`.

    Attributes:
        reused: number of verdicts that were in the cache.

    Raises:
        ConfigError: the address is not a URL.
        DataError: the cache is another kind of file.
        JudgeError: the address cannot be reached (if it is asked for its models).

    Example:
        >>> judge = Judge(JudgeConfig(url="http://127.0.0.1:8420"))              # doctest: +SKIP
        >>> judge.compare([Comparison(ours, theirs)])[0].winner                  # doctest: +SKIP
        'first'
    """

    def __init__(
        self,
        config: JudgeConfig,
        *,
        key: str | None = None,
        cache: Path | None = None,
        client: JudgeClient | None = None,
    ) -> None:
        self.config = config
        self.client = client or JudgeClient(
            config.url, key=key, timeout_s=config.timeout_s, retries=config.retries
        )
        self.cache = ReplyCache(cache)
        self.model = config.model or self.client.first_model()
        self.name = f"{self.model} at {self.client.url}"
        self.reused = 0
        self._form: Form = "json"
        self._lock = threading.Lock()

    def compare(self, comparisons: Sequence[Comparison]) -> list[Judged]:
        """Returns the decision about each pair, judged in both orders.

        Raises:
            JudgeError: a request is refused, or not answered after all retries; the replies so far
                are in the cache.
        """
        orders = []
        for pair in comparisons:
            question = conversation_text(pair.first.prompt.messages)
            orders += [
                (question, pair.first.text, pair.second.text),
                (question, pair.second.text, pair.first.text),
            ]
        keys = [self._key(*each) for each in orders]
        asked = [(pair, swapped) for pair in comparisons for swapped in (False, True)]
        messages = dict(zip(keys, asked, strict=True))
        missing = [key for key in messages if self.cache.get(key) is None]
        self.reused += len(messages) - len(missing)
        self._ask_all([partial(self._ask, key, *messages[key]) for key in missing])
        verdicts = [parse_verdict(self.cache.get(key) or "") for key in keys]
        return [Judged.of_orders(*both) for both in zip(verdicts[::2], verdicts[1::2], strict=True)]

    def _ask_all(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Runs tasks in threads; after a failure, those that have not begun are dropped."""
        failed = threading.Event()

        def run(task: Callable[[], None]) -> None:
            if failed.is_set():
                return
            try:
                task()
            except BaseException:
                failed.set()
                raise

        pool = ThreadPoolExecutor(self.config.concurrency)
        try:
            with Progress("judging", total=len(tasks), unit="verdict") as progress:
                for future in [pool.submit(run, task) for task in tasks]:
                    future.result()
                    progress.advance()
        finally:
            failed.set()  # also after Ctrl-C
            pool.shutdown(wait=True, cancel_futures=True)

    def _ask(self, key: str, pair: Comparison, swapped: bool) -> None:
        """Asks the judge about a pair in one order, and keeps its reply."""
        form = self._form
        try:
            reply = self.client.chat(self._body(pair, swapped, form))
        except Refused as refusal:
            if form == "text" or refusal.status not in NOT_SUPPORTED:
                raise
            # another fault of the request is refused again, and then reported
            reply = self.client.chat(self._body(pair, swapped, "text"))
            with self._lock:
                self._form = "text"
        self.cache.add(key, reply)

    def _body(self, pair: Comparison, swapped: bool, form: Form) -> JsonObject:
        texts = (pair.first.text, pair.second.text)
        a, b = reversed(texts) if swapped else texts
        config = self.config
        body: JsonObject = {
            "model": self.model,
            "messages": judge_messages(
                pair.first.prompt.messages,
                a,
                b,
                language=config.language,
                form=form,
                reason=config.reason,
            ),
            "temperature": 0,
            "seed": config.seed,
            "max_tokens": config.max_tokens,
        }
        if form == "json":
            schema = {"name": "verdict", "schema": verdict_schema(reason=config.reason)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    def _key(self, question: str, answer_a: str, answer_b: str) -> str:
        config = self.config
        instructions = judge_messages(
            [], "", "", language=config.language, form="json", reason=config.reason
        )
        return request_key(
            {
                "url": self.client.url,
                "model": self.model,
                "instructions": instructions,
                "seed": config.seed,
                "max_tokens": config.max_tokens,
                "question": question,
                "answers": [answer_a, answer_b],
            }
        )


__all__ = ["Judge"]
