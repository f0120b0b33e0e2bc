"""A load generator for servers with OpenAI's API: `easyllm bench serve`.

Open loop: requests arrive at random times (a Poisson process), however slow the server is, as from
many independent users. Closed loop: each of a number of clients waits for its answer before it asks
again. Every answer is streamed; its times are those at which bytes arrive at this process.
"""

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from easyllm.core.errors import ConfigError
from easyllm.core.json_types import Json, JsonObject
from easyllm.serve.http_client import Address, HTTPClient
from easyllm.serve.http_response import HTTPFailure
from easyllm.serve.load_options import Load, LoadOptions
from easyllm.serve.load_prompts import RandomPrompts, fit_length, one_token_words
from easyllm.serve.load_stats import Answer, Run, errors_of
from easyllm.serve.load_stream import AnswerStream, message_of

PATHS = {"chat": "/chat/completions", "completions": "/completions"}
OnAnswer = Callable[[Load, Answer], None]


class LoadTest:
    """Measures a server under one load after the other.

    Args:
        url: address of the server, with or without `/v1`.
        options: loads and requests.
        api_key: sent as a bearer token.
        prompts: prompts to use instead of random ones, without end.

    Attributes:
        on_answer: called for each measured answer.
        runs: what has been measured so far; the last run may not be complete.
        notes: what a reader of the numbers should know.

    Example:
        test = LoadTest("http://127.0.0.1:8420", LoadOptions(concurrency=(1, 32)))
        asyncio.run(test.run())
        print(test.report())

    Raises:
        ConfigError: the URL is not one.
    """

    def __init__(
        self,
        url: str,
        options: LoadOptions,
        *,
        api_key: str | None = None,
        prompts: Iterable[JsonObject] | None = None,
    ) -> None:
        address = Address.parse(url)
        prefix = address.prefix.removesuffix("/v1")
        root = Address(address.host, address.port, address.secure, prefix)
        headers = {} if api_key is None else {"Authorization": f"Bearer {_sendable(api_key)}"}
        self.client = HTTPClient(root, headers=headers, timeout_s=options.timeout_s)
        self.options, self.model = options, options.model or ""
        self.runs: list[tuple[Load, Run]] = []
        self.notes: list[str] = []
        self._prompts = prompts
        self.on_answer: OnAnswer = _ignore
        self._usage, self._num_open = True, 0

    async def run(self) -> None:
        """Measures all loads; if it is cancelled, `runs` contains what has been measured.

        Raises:
            ConfigError: the server cannot be reached, or refuses the requests.
        """
        try:
            self.model = self.model or await self._only_model()
            if self._prompts is None:
                words = await one_token_words(self.client, self.model)
                options = self.options
                random_prompts = RandomPrompts(words, 1, options.dialect, options.seed)
                self.notes += await fit_length(
                    random_prompts, options.prompt_tokens, self._count_tokens
                )
                self._prompts = random_prompts
            else:
                await self._count_tokens(next(iter(self._prompts)))
            for load in self.options.loads:
                await self._measure(load)
        finally:
            self.client.close()

    def report(self) -> JsonObject:
        """Returns the server, the requests, and a summary of each run."""
        repeated = self.client.num_repeated
        notes = [f"requests sent again because the server had closed a connection: {repeated}"]
        return {
            "url": str(self.client.address),
            "model": self.model,
            **self.options.model_dump(
                include={"dialect", "requests", "max_tokens", "ignore_eos", "seed"}
            ),
            "notes": [*self.notes, *(notes if repeated else [])],
            "runs": [
                {
                    **load.model_dump(exclude_none=True),
                    "warmup": self.options.warmup_of(load),
                    **run.summary(),
                }
                for load, run in self.runs
            ],
        }

    async def _measure(self, load: Load) -> None:
        """Runs the warm-up of a load, then its measured requests."""
        assert self._prompts is not None, "chosen first"
        prompts = iter(self._prompts)
        warmup = Run(time.perf_counter())
        number = self.options.warmup_of(load)
        await self._clients(load.clients or number, islice(prompts, number), warmup, _ignore, load)
        for kind, found in errors_of(warmup.answers).items():
            self.notes.append(f"{load}: warm-up requests that failed: {found['count']} × {kind}")
        run = Run(time.perf_counter())
        self.runs.append((load, run))
        cpu_s = time.process_time()
        measured = islice(prompts, self.options.requests)
        try:
            if load.rate is None:
                await self._clients(load.clients or 1, measured, run, self.on_answer, load)
            else:
                await self._arrivals(load.rate, measured, run, load)
        finally:
            run.end_s, run.cpu_s = time.perf_counter(), time.process_time() - cpu_s
            run.num_unanswered = self._num_open

    async def _clients(
        self,
        number: int,
        prompts: Iterator[JsonObject],
        run: Run,
        on_answer: OnAnswer,
        load: Load,
    ) -> None:
        """Closed loop: a number of clients share the prompts."""

        async def work() -> None:
            for prompt in prompts:
                run.answers.append(await self._ask(self._body(prompt)))
                on_answer(load, run.answers[-1])

        async with asyncio.TaskGroup() as group:
            for _ in range(number):
                group.create_task(work())

    async def _arrivals(
        self, rate: float, prompts: Iterator[JsonObject], run: Run, load: Load
    ) -> None:
        """Open loop: sends requests at random times, `rate` per second on average."""
        arrivals = random.Random(self.options.seed)
        due_s = run.start_s

        async def send(body: bytes) -> None:
            run.answers.append(await self._ask(body))
            self.on_answer(load, run.answers[-1])

        async with asyncio.TaskGroup() as group:
            for prompt in prompts:
                body = self._body(prompt)
                await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                run.late_s.append(time.perf_counter() - due_s)
                group.create_task(send(body))
                due_s += arrivals.expovariate(rate)

    async def _ask(self, body: bytes) -> Answer:
        """Sends a request and returns the course of its answer, which may be a failure."""
        answer = Answer(time.perf_counter())
        stream = AnswerStream(answer)
        self._num_open += 1
        try:
            path = f"/v1{PATHS[self.options.dialect]}"
            stream.finish(await self.client.stream("POST", path, body, stream.take))
        except HTTPFailure as failure:
            answer.error = str(failure)
        answer.end_s = time.perf_counter()
        self._num_open -= 1
        return answer

    def _body(self, prompt: JsonObject, **changes: Json) -> bytes:
        body = {
            "model": self.model,
            **prompt,
            "max_tokens": self.options.max_tokens,
            "temperature": 0,
            "stream": True,
        }
        if self._usage:
            body["stream_options"] = {"include_usage": True}
        if self.options.ignore_eos:
            body["ignore_eos"] = True
        return json.dumps(body | changes).encode()

    async def _count_tokens(self, prompt: JsonObject) -> int | None:
        """Returns the number of a prompt's tokens in the server's usage; None without usage.

        Raises:
            ConfigError: the server does not answer the request.
        """
        answer = await self._ask(self._body(prompt, max_tokens=1))
        if answer.error == "HTTP 400" and self._usage and "stream_options" in answer.detail:
            self._usage = False
            self.notes.append("the server does not report usage: tokens are counted by chunks")
            answer = await self._ask(self._body(prompt, max_tokens=1))
        if answer.error is not None:
            raise self._unusable(answer.error, answer.detail)
        return answer.prompt_tokens

    async def _only_model(self) -> str:
        """Returns the name of the only model that the server lists.

        Raises:
            ConfigError: it lists several or none, or does not answer.
        """
        try:
            status, body = await self.client.request("GET", "/v1/models")
        except HTTPFailure as failure:
            raise self._unusable(str(failure), "") from None
        if status != 200:
            raise self._unusable(f"HTTP {status}", message_of(body))
        try:
            entries: Json = json.loads(body)["data"]
            names = [str(entry["id"]) for entry in entries]
        except (ValueError, KeyError, TypeError):
            names = []
        if len(names) != 1:
            listed = f"the models {', '.join(names[:10])}" if names else "no model"
            raise ConfigError(
                f"the server at {self.client.address} lists {listed}; name one with --model"
            )
        return names[0]

    def _unusable(self, error: str, detail: str) -> ConfigError:
        """Returns the error for a server that does not answer a first request."""
        where = self.client.address
        if error.startswith("HTTP"):
            remedy = "give its key with --api-key" if error == "HTTP 401" else "change the request"
            said = f": {detail.rstrip('.')}" if detail else ""
            return ConfigError(f"the server at {where} refuses requests ({error}{said}); {remedy}")
        more = f": {detail}" if detail else ""
        return ConfigError(
            f"no usable server at {where} ({error}{more}); check the URL, or start one: "
            "easyllm serve smollm2"
        )


def _sendable(api_key: str) -> str:
    """Returns a key that can be sent in a header.

    Raises:
        ConfigError: it contains a character that headers do not have.
    """
    if api_key and all("!" <= character <= "~" for character in api_key):
        return api_key
    raise ConfigError(
        "the API key is empty, or contains a space or a non-ASCII character; give another one"
    )


def _ignore(_load: Load, _answer: Answer) -> None:
    pass
