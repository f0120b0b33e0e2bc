"""The server's metrics, in Prometheus's text format.

Names and meanings are those of vLLM's metrics with the prefix `easyllm_` instead of `vllm:`, and
the label `model` instead of `model_name`. Values of an engine are read when the page is rendered;
tokens and times are recorded once per step, in the engine's thread. Times therefore exclude the
writing of the response, which `easyllm bench serve` includes.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Literal

from easyllm.engine.engine import Engine
from easyllm.engine.request import Request, TokenEvent
from easyllm.serve.exposition import CONTENT_TYPE, Counter, Gauge, Histogram, Labels
from easyllm.serve.trace import RequestTrace

REQUEST_BUCKETS_S = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0),
)
"""Bounds for times of a request: from a cached prompt on a GPU to a long answer on a CPU."""
TOKEN_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0),
)
"""Bounds for times between tokens, finer where people begin to notice a delay."""
Unfinished = Literal["abort", "error"]


class Metrics:
    """All metrics of a server; its methods may be called from any thread.

    Example:
        metrics = Metrics()
        metrics.add_engine("smollm2", llm.engine)
        watch = metrics.watch("smollm2", request)
        watch.started()
        watch.take(events)
        text = metrics.render()
    """

    content_type = CONTENT_TYPE

    def __init__(self) -> None:
        self._engines: Mapping[str, tuple[Engine, Callable[[], int]]] = {}
        model = ("model",)
        self.prompt_tokens = Counter(
            "easyllm_prompt_tokens_total", "Prompt tokens, including cached ones.", model
        )
        self.cached_tokens = Counter(
            "easyllm_prompt_tokens_cached_total",
            "Prompt tokens whose keys and values were in the prefix cache.",
            model,
        )
        self.generation_tokens = Counter(
            "easyllm_generation_tokens_total", "Generated tokens.", model
        )
        self.finished = Counter(
            "easyllm_requests_finished_total",
            "Completions by why they ended: stop, length, cancelled (by the engine), abort (the "
            "client is gone), error.",
            ("model", "finished_reason"),
        )
        self.responses = Counter(
            "easyllm_http_requests_total",
            "HTTP responses; 499 if the client was gone before the response began.",
            ("method", "route", "status"),
        )
        self.first_token = Histogram(
            "easyllm_time_to_first_token_seconds",
            "Time from a request's arrival to its first token.",
            model,
            REQUEST_BUCKETS_S,
        )
        self.between_tokens = Histogram(
            "easyllm_inter_token_latency_seconds",
            "Time between successive tokens of a completion.",
            model,
            TOKEN_BUCKETS_S,
        )
        self.latency = Histogram(
            "easyllm_e2e_request_latency_seconds",
            "Time from a request's arrival to its last token.",
            model,
            REQUEST_BUCKETS_S,
        )
        self.queue_time = Histogram(
            "easyllm_request_queue_time_seconds",
            "Time from the end of tokenization until the engine first computes a request.",
            model,
            REQUEST_BUCKETS_S,
        )

    def add_engine(
        self, model: str, engine: Engine, *, undelivered: Callable[[], int] | None = None
    ) -> None:
        """Includes an engine's own numbers.

        Args:
            model: value of the label `model`.
            engine: the engine.
            undelivered: number of requests on their way to the engine, which wait too.
        """
        self._engines = {**self._engines, model: (engine, undelivered or _none)}
        for counter in (self.prompt_tokens, self.cached_tokens, self.generation_tokens):
            counter.add((model,), 0)

    def remove_engine(self, model: str) -> None:
        """Leaves out an engine that is not served any more; its totals remain."""
        self._engines = {name: each for name, each in self._engines.items() if name != model}

    def watch(
        self, model: str, request: Request, trace: RequestTrace | None = None
    ) -> "RequestWatch":
        """Starts to record a request that is about to be given to the engine.

        Args:
            model: value of the label `model`.
            request: the request.
            trace: of its HTTP request, in which tokens and times are recorded as well.
        """
        return RequestWatch(self, model, request, trace or RequestTrace())

    def responded(self, trace: RequestTrace) -> None:
        """Counts an HTTP response."""
        status = trace.status or (499 if trace.client_gone else 500)
        self.responses.add((trace.method, trace.route, str(status)))

    def render(self) -> str:
        """Returns all metrics in the text format."""
        families: Iterable[Counter | Gauge | Histogram] = chain(
            self._gauges(),
            (self.prompt_tokens, self.cached_tokens, self.generation_tokens),
            (self.finished, self.responses),
            (self.first_token, self.between_tokens, self.latency, self.queue_time),
        )
        return "".join(f"{line}\n" for family in families for line in family.lines())

    def _gauges(self) -> Iterator[Gauge]:
        """The engines' own numbers.

        Each is a length or an integer, which is read atomically while the engine's thread runs; two
        numbers may be from before and after the same change.
        """

        def each(read: Callable[[Engine, Callable[[], int]], float]) -> Callable[[], _Values]:
            return lambda: [((name,), read(*found)) for name, found in self._engines.items()]

        yield Gauge(
            "easyllm_num_requests_running",
            "Sequences in the running batch.",
            ("model",),
            each(lambda engine, _: len(engine.scheduler.running)),
        )
        yield Gauge(
            "easyllm_num_requests_waiting",
            "Requests that wait to be computed, or to be computed again.",
            ("model",),
            each(lambda engine, arriving: len(engine.scheduler.waiting) + arriving()),
        )
        yield Gauge(
            "easyllm_kv_cache_usage_perc",
            "Fraction of the KV cache's pages in use, 0 to 1; pages kept only for reuse are free.",
            ("model",),
            each(lambda engine, _: 1 - engine.pool.available / engine.pool.num_pages),
        )
        yield Gauge(
            "easyllm_num_preemptions_total",
            "Sequences that had to release their pages and are computed again.",
            ("model",),
            each(lambda engine, _: engine.scheduler.num_preemptions),
            kind="counter",
        )


_Values = Sequence[tuple[Labels, float]]


class RequestWatch:
    """Records one request of an engine; used by one thread at a time.

    Args:
        metrics: where to record.
        model: value of the label `model`.
        request: the request.
        trace: of its HTTP request; its arrival is the start of all times.
    """

    __slots__ = ("_labels", "_last_s", "_metrics", "_size", "_submitted_s", "_trace", "_unfinished")

    def __init__(self, metrics: Metrics, model: str, request: Request, trace: RequestTrace) -> None:
        self._metrics, self._labels, self._trace = metrics, (model,), trace
        self._unfinished, self._size = request.params.n, len(request.prompt_ids)
        self._submitted_s = time.monotonic()
        self._last_s: float | None = None

    def started(self, now_s: float | None = None) -> None:
        """Records that the engine computes the request for the first time."""
        now_s = time.monotonic() if now_s is None else now_s
        self._metrics.queue_time.observe(self._labels, max(0.0, now_s - self._submitted_s))

    def take(self, events: Sequence[TokenEvent], now_s: float | None = None) -> None:
        """Records the events of one step.

        A step may generate several tokens of a completion (draft tokens); the time since the
        previous step is divided among them.
        """
        now_s = time.monotonic() if now_s is None else now_s
        tokens = sum(event.token_id is not None for event in events)
        if self._last_s is None:
            self._begin(events, now_s)
        elif tokens:
            completions = len({event.index for event in events})
            gap = (now_s - self._last_s) * completions / tokens
            self._metrics.between_tokens.observe(self._labels, gap, tokens)
        self._last_s = now_s
        self._metrics.generation_tokens.add(self._labels, tokens)
        self._trace.completion_tokens += tokens
        for event in events:
            if event.finish_reason is not None:
                self._finish(event.finish_reason)
        if not self._unfinished:
            self._metrics.latency.observe(self._labels, now_s - self._trace.arrived_s)

    def abandoned(self, reason: Unfinished) -> None:
        """Records the end of the completions that have not finished, if any."""
        while self._unfinished:
            self._finish(reason)

    def _begin(self, events: Sequence[TokenEvent], now_s: float) -> None:
        cached = max(event.cached_tokens for event in events)
        metrics, trace = self._metrics, self._trace
        metrics.prompt_tokens.add(self._labels, self._size)
        metrics.cached_tokens.add(self._labels, cached)
        metrics.first_token.observe(self._labels, now_s - trace.arrived_s)
        trace.prompt_tokens += self._size
        trace.cached_tokens += cached
        trace.first_token_s = trace.first_token_s or now_s

    def _finish(self, reason: str) -> None:
        self._unfinished -= 1
        self._metrics.finished.add((*self._labels, reason))
        self._trace.finish_reasons.append(reason)


def _none() -> int:
    return 0
