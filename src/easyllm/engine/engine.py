"""The engine: requests join and leave a running batch step by step."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from easyllm.core.errors import ConfigError
from easyllm.engine.kv_cache import BatchCache, SequenceCache
from easyllm.engine.request import FinishReason, Request, TokenEvent
from easyllm.engine.sampling import choose
from easyllm.engine.stopping import StopStrings
from easyllm.nn.decoder import Decoder
from easyllm.ops.attention import AttentionContext
from easyllm.tokenizer.stream import StreamDecoder
from easyllm.tokenizer.tokenizer import Tokenizer

MAX_RUNNING = 32
MAX_PREFILL_TOKENS = 2048
"""Most prompt tokens that join in one step, so that running requests never wait long."""


@dataclass(slots=True)
class _Running:
    request: Request
    cache: SequenceCache
    decoder: StreamDecoder
    stops: StopStrings
    generator: torch.Generator | None
    pending: list[int]
    """Ids the model has not seen yet: the prompt at first, then the last token."""
    limit: int
    generated: int = 0
    end_ids: frozenset[int] = field(default_factory=frozenset)


class Engine:
    """Generates for any number of requests at once, on one model.

    Args:
        model: in inference mode.
        tokenizer: for text and end tokens.

    Example:
        engine = Engine(model, tokenizer)
        engine.add(Request(prompt_ids=(1, 2, 3), params=SamplingParams(max_tokens=8)))
        while engine.busy:
            for event in engine.step(): ...
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_seq_len = model.config.max_seq_len
        self._waiting: deque[Request] = deque()
        self._running: list[_Running] = []

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._waiting or self._running)

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            ConfigError: the prompt is empty, too long, or holds an id the model does not have.
        """
        length = len(request.prompt_ids)
        if length == 0:
            raise ConfigError("the prompt is empty; give at least one token")
        if length >= self.max_seq_len:
            raise ConfigError(
                f"the prompt has {length} tokens, the model's context holds {self.max_seq_len} with "
                "at least one new token; shorten the prompt"
            )
        worst = max(request.prompt_ids)
        if min(request.prompt_ids) < 0 or worst >= self.model.config.vocab_size:
            raise ConfigError(
                f"the prompt holds token id {worst}, the model has ids 0 to {self.model.config.vocab_size - 1}"
            )
        self._waiting.append(request)

    def cancel(self, request_id: int) -> None:
        """Forgets a request at once, wherever it stands."""
        self._waiting = deque(r for r in self._waiting if r.id != request_id)
        self._running = [r for r in self._running if r.request.id != request_id]

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """One forward pass: prompts of new requests and the next token of running ones."""
        self._admit()
        batch = self._running
        if not batch:
            return []
        lengths = [len(r.pending) for r in batch]
        store = BatchCache([r.cache for r in batch], lengths)
        context = AttentionContext.packed(
            lengths,
            device=self.model.device,
            store=store,
            offsets=[r.cache.length for r in batch],
            prefix_lengths=self._prefixes(batch),
        )
        ids = torch.tensor([i for r in batch for i in r.pending], device=self.model.device)
        hidden = self.model(ids, context)
        store.commit()
        last = torch.tensor(lengths, device=hidden.device).cumsum(0) - 1
        logits = self.model.head(hidden.index_select(0, last))
        tokens, logprobs = choose(
            logits, [r.request.params for r in batch], [r.generator for r in batch]
        )
        events = [
            self._advance(running, token, logprob)
            for running, token, logprob in zip(batch, tokens, logprobs, strict=True)
        ]
        done = {event.request_id for event in events if event.finish_reason}
        self._running = [r for r in batch if r.request.id not in done]
        return events

    def run(self, requests: Iterable[Request]) -> Iterator[TokenEvent]:
        """Adds requests and yields events until all of them are finished."""
        for request in requests:
            self.add(request)
        while self.busy:
            yield from self.step()

    def _prefixes(self, batch: list[_Running]) -> tuple[int, ...] | None:
        """The prompts of a prefix language model, whose tokens see each other both ways."""
        if self.model.config.prompt_mask == "causal":
            return None
        return tuple(len(r.request.prompt_ids) for r in batch)

    def _admit(self) -> None:
        room = MAX_PREFILL_TOKENS
        while self._waiting and len(self._running) < MAX_RUNNING:
            request = self._waiting[0]
            if len(request.prompt_ids) > room and room < MAX_PREFILL_TOKENS:
                break
            room -= len(request.prompt_ids)
            self._running.append(self._start(self._waiting.popleft()))

    def _start(self, request: Request) -> _Running:
        params, config = request.params, self.model.config
        generator = None
        if params.temperature > 0:
            generator = torch.Generator()
            if params.seed is None:
                generator.seed()
            else:
                generator.manual_seed(params.seed)
        room = self.max_seq_len - len(request.prompt_ids)
        ends = () if params.ignore_eos else config.eos_token_ids
        return _Running(
            request=request,
            cache=SequenceCache(config, self.model.embed_tokens.weight.dtype, self.model.device),
            decoder=StreamDecoder(self.tokenizer),
            stops=StopStrings(params.stop),
            generator=generator,
            pending=list(request.prompt_ids),
            limit=min(params.max_tokens or room, room),
            end_ids=frozenset((*ends, *params.stop_token_ids)),
        )

    def _advance(self, running: _Running, token: int, logprob: float) -> TokenEvent:
        """Takes a new token into a request; the event says what it gave and whether it was the last."""
        running.pending = [token]
        running.generated += 1
        reason: FinishReason | None = None
        if token in running.end_ids:
            text, reason = running.stops.push(running.decoder.flush()), "stop"
        else:
            text = running.stops.push(running.decoder.push(token))
            if running.generated >= running.limit:
                text, reason = text + running.stops.push(running.decoder.flush()), "length"
        if running.stops.stopped:
            reason = "stop"
        elif reason is not None:
            text += running.stops.flush()
        return TokenEvent(
            request_id=running.request.id,
            token_id=token,
            text=text,
            logprob=logprob,
            finish_reason=reason,
        )
