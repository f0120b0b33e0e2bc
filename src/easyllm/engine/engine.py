"""Inference engine with continuous batching: requests join and leave the batch at any step."""

import itertools
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from easyllm.core.device import memory_free_bytes
from easyllm.core.errors import ConfigError
from easyllm.engine.adapter_watch import AdapterWatch
from easyllm.engine.admission import bound_new_tokens, check_generates, check_ids
from easyllm.engine.generation import Generation, RequestState, new_generation
from easyllm.engine.kv_cache import KVCache, cache_format, cache_itemsize
from easyllm.engine.memory_plan import plan_memory, tensor_bytes
from easyllm.engine.options import EngineConfig
from easyllm.engine.pages import Namespace, PagePool
from easyllm.engine.request import Request, TokenEvent
from easyllm.engine.runner import DecoderRunner, Runner
from easyllm.engine.scheduler import Scheduler, Sequence
from easyllm.engine.speculative import Drafter, keys_depend_on_length
from easyllm.engine.step import ScheduledChunk
from easyllm.engine.step_sampling import SampleSlot, sample_slots, store_prompt_logprobs
from easyllm.nn.config import LinearAttentionConfig, ModelConfig
from easyllm.nn.decoder import Decoder
from easyllm.plan.kv_cache import rolling_window
from easyllm.plan.process import process_bytes
from easyllm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from easyllm.engine.sampling import Draft


class Engine:
    """Serves any number of concurrent requests with one model.

    Args:
        model: the model, in inference mode.
        tokenizer: decodes tokens to text.
        options: sizes of the KV cache and of the batches.
        runner: computes the steps; by default the model itself on a paged KV cache.
        drafter: proposes draft tokens (speculative decoding).

    Raises:
        ConfigError: the cache does not fit into memory; the drafter does not support the model; or
            deterministic mode is requested and the model does not support it.

    Example:
        engine = Engine(model, tokenizer)
        engine.add(Request(prompt_ids=(1, 2, 3), params=SamplingParams(max_tokens=8)))
        while engine.busy:
            for event in engine.step(): ...
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        options: EngineConfig | None = None,
        *,
        runner: Runner | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        options = options or EngineConfig()
        config = model.config
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.max_seq_len = config.max_seq_len
        self._adapters = AdapterWatch(
            model, deterministic=options.deterministic, drafts=drafter is not None
        )
        self._dtype = cache_format(options.cache_dtype, _usual_cache_dtype(model, options))
        self.cache_itemsize = cache_itemsize(config, self._dtype)
        weights = tensor_bytes((*model.parameters(), *model.buffers()))
        self.memory = plan_memory(
            config,
            options,
            weight_bytes=weights,
            itemsize=self.cache_itemsize,
            free_bytes=memory_free_bytes(model.device),
            dtype_bytes=model.dtype.itemsize,
            on_demand=model.device.type == "cpu",
            own_bytes=max(0, process_bytes() - weights * (model.device.type == "cpu")),
        )
        if drafter is not None:
            drafter.check(config)
        first = config.vocab_size  # ids of virtual tokens follow those of the vocabulary
        self._virtual = tuple(range(first, first + model.num_virtual_tokens))
        self._start = () if config.encoder is None else (config.encoder.start_token_id,)
        self.drafter, self._runner = drafter, runner
        whole = config.has_prefix or keys_depend_on_length(config)
        self.pool = PagePool(
            self.memory.num_pages,
            options.page_size,
            prefix_caching=options.prefix_caching and not whole and not _has_states(config),
        )
        rolling = rolling_window(config)
        self.scheduler = Scheduler(
            self.pool,
            max_running=options.max_running,
            max_step_tokens=options.max_step_tokens,
            window=rolling.window if rolling else None,
            num_sinks=rolling.num_sinks if rolling else 0,
            unchunked_prefill=whole,
            prefix=config.has_prefix,
            prefix_excludes=config.prefix_excludes,
        )
        self._requests: dict[int, RequestState] = {}
        self._generations: dict[int, Generation] = {}  # by the id of their sequence
        self._drafts: dict[int, tuple[Draft, ...]] = {}
        # by request id: the event queue of the `run` call that added the request
        self._event_queues: dict[int, deque[TokenEvent]] = {}
        self._cancelled: list[TokenEvent] = []  # events that the next step returns
        self._numbers = itertools.count()

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished, or an event has not been returned yet."""
        return self.scheduler.busy or bool(self._cancelled)

    @property
    def runner(self) -> Runner:
        """The runner that computes the steps; its KV cache is allocated on first access."""
        if self._runner is None:
            cache = KVCache(
                self.model.config,
                self.pool.num_pages,
                self.pool.page_size,
                self._dtype,
                self.model.device,
            )
            self._runner = DecoderRunner(
                self.model,
                cache,
                compiled=self.options.compiled_step,
                deterministic=self.options.deterministic,
            )
        return self._runner

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            ConfigError: the prompt is empty or contains an id outside the vocabulary; it is too
                long for the context or the cache; or the request needs token ids, an adapter or a
                number of completions that the engine does not have.
        """
        if self._adapters.stale:
            self.adapters_changed()
        if request.id in self._requests:
            raise ConfigError(f"request {request.id} is being served already; create a new Request")
        params = request.params
        limit = self.check_prompt(request.prompt_ids, params.max_tokens)
        check_ids("logit_bias", params.logit_bias, self.model.config.vocab_size)
        check_ids("stop_token_ids", params.stop_token_ids, self.model.config.vocab_size)
        check_generates(self.model.config, prompt_rows=params.prompt_logprobs is not None)
        copies = params.num_sequences
        if copies > self.scheduler.max_running:
            raise ConfigError(
                f"the request needs {copies} completions, but at most {self.scheduler.max_running} "
                "sequences run at once; lower n or best_of, or raise max_running"
            ).about("n")
        self.check_adapter(request.adapter)
        tokens = list(self.prepend_virtual_tokens(request.prompt_ids))
        sequence = Sequence(
            id=self.next_sequence_id(),
            tokens=tokens,
            prompt_length=len(tokens),
            namespace=Namespace(adapter=request.adapter, salt=request.salt),
            copies=copies,
            prompt_rows=params.prompt_logprobs is not None,
        )
        first = self._generation(request, 0, sequence, limit)
        self._requests[request.id] = RequestState(request, [first])
        self.scheduler.add(sequence)

    def adapters_changed(self) -> None:
        """Updates the engine after adapters were attached to or removed from the model.

        `add` and `step` call it, too. Only what belongs to the changed adapters is dropped: their
        cached prefixes, and the requests of adapters that were removed or replaced, which end as
        `cancelled` in the next step. Other requests continue. A changed adapter without a name
        changes the base, and so everything is recomputed.

        Raises:
            ConfigError: this engine cannot serve an adapter that was attached.
        """
        names = self._adapters.changed_names()
        if "" in names:
            self.clear_prefix_cache()
        for name in names - {""}:
            self.pool.clear_prefix_cache(name)
            for state in [s for s in self._requests.values() if s.request.adapter == name]:
                self._cancelled += state.cancelled_events()
                self.cancel(state.request.id)

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Names of the adapters that a request may select."""
        return self._adapters.names

    def prepend_virtual_tokens(self, prompt_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the prompt's ids, preceded by those of the virtual tokens of the adapter.

        In an encoder–decoder the token with which the decoder starts follows them.
        """
        return (*self._virtual, *prompt_ids, *self._start)

    def has_started(self, request_id: int) -> bool:
        """Whether a request has left the queue at least once, or is not here any more."""
        state = self._requests.get(request_id)
        return state is None or state.generations[0].sequence.cached is not None

    def cancel(self, request_id: int) -> None:
        """Drops a request immediately, in whatever state it is, and frees its pages."""
        state = self._requests.pop(request_id, None)
        for generation in state.generations if state else ():
            if generation.sequence.id in self._generations:
                self._remove_generation(generation)

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Runs one forward pass: decodes the running requests and prefills chunks of prompts.

        Returns:
            The events of the step: one token for each decoding completion, or several if draft
            tokens were accepted.

        Raises:
            ConfigError: an adapter that this engine cannot serve was attached to the model.
        """
        if self._adapters.stale:
            self.adapters_changed()
        if self._cancelled:
            cancelled, self._cancelled = self._cancelled, []
            return cancelled
        self._draft()
        step = self.scheduler.plan()
        if step is None:
            return []
        try:
            logits = self.runner.run(step)
            slots, end = list[SampleSlot](), 0
            for piece in step.pieces:
                end += piece.num_logit_rows
                slots += self._sample_slots(piece, logits, end)
            events = sample_slots(slots, logits, row_by_row=self.options.deterministic)
            return self._finish_step(slots, events)
        except BaseException:
            # It is unknown what the failed pass has written, and recurrent states may be ahead of
            # the recorded number of computed tokens: all running sequences are recomputed, unless
            # they are cancelled first.
            self.scheduler.preempt_all()
            raise

    def run(self, requests: Iterable[Request]) -> Iterator[TokenEvent]:
        """Adds requests and yields their events until all have finished.

        Closing the iterator early cancels the requests. Several `run` iterators may be interleaved:
        each yields only the events of its own requests, no matter which one executes the steps.
        """
        # a refused request may already be served by another run, and must continue there
        added, inbox = list[Request](), deque[TokenEvent]()
        try:
            for request in requests:
                self.add(request)
                added.append(request)
                self._event_queues[request.id] = inbox
            while inbox or self._expects_events(added):
                while inbox:
                    yield inbox.popleft()
                for event in self.step():
                    self._event_queues.get(event.request_id, inbox).append(event)
        finally:
            for request in added:
                self.cancel(request.id)
                self._event_queues.pop(request.id, None)

    def _expects_events(self, requests: Iterable[Request]) -> bool:
        """Whether further steps return events of any of these requests."""
        waiting = {event.request_id for event in self._cancelled}
        return any(request.id in self._requests or request.id in waiting for request in requests)

    def clear_prefix_cache(self) -> None:
        """Clears the prefix cache; must be called when the model's weights have changed.

        Running requests are recomputed with the new weights and continue from the tokens that they
        have generated.
        """
        self.scheduler.preempt_all()
        self.pool.clear_prefix_cache()
        if isinstance(self._runner, DecoderRunner):
            self._runner.weights_changed()

    def check_prompt(self, prompt_ids: tuple[int, ...], max_tokens: int | None) -> int:
        """Returns the maximum number of tokens that may be generated after a prompt.

        The bound is the minimum of `max_tokens` and what the context and the cache allow.

        Raises:
            ConfigError: the model cannot generate; the prompt is empty or contains an unknown id.
            ContextLengthError: the prompt, or the prompt plus `max_tokens`, is too long for the
                context or the cache.
        """
        check_generates(self.model.config)
        self.check_tokens(prompt_ids)
        length = len(prompt_ids) + len(self._virtual) + len(self._start)
        return bound_new_tokens(length, max_tokens, self.max_seq_len, self.scheduler)

    def check_tokens(self, prompt_ids: Collection[int]) -> None:
        """Refuses prompts that the model cannot read.

        Raises:
            ConfigError: the prompt is empty, or contains an id outside the vocabulary.
        """
        if not prompt_ids:
            raise ConfigError("the prompt is empty; give at least one token").about("messages")
        check_ids("the prompt", prompt_ids, self.model.config.vocab_size)

    def check_adapter(self, name: str) -> None:
        """Refuses an adapter that the model does not have; empty is the base model.

        Raises:
            ConfigError: there is no adapter of this name.
        """
        if name and name not in self.adapter_names:
            held = ", ".join(self.adapter_names) or "none"
            raise ConfigError(
                f"the request names the adapter {name!r}, which is not served (served adapters: "
                f"{held})"
            ).about("model")

    def next_sequence_id(self) -> int:
        """Returns a new, unique sequence id."""
        return next(self._numbers)

    def _generation(
        self, request: Request, index: int, sequence: Sequence, limit: int
    ) -> Generation:
        """Creates the state of a completion that has no token yet, and registers it."""
        generation = new_generation(
            request,
            index,
            sequence,
            limit,
            tokenizer=self.tokenizer,
            end_ids=self.model.config.eos_token_ids,
            num_virtual=len(self._virtual),
        )
        self._generations[sequence.id] = generation
        return generation

    def _draft(self) -> None:
        """Gets draft tokens for every sequence that is about to decode."""
        if self.drafter is None:
            return
        ready = [
            generation
            for sequence in self.scheduler.running
            if sequence.pending == 1
            and (generation := self._generations[sequence.id]).sampler.num_output
        ]
        self._drafts = self.drafter.propose(ready)
        for generation in ready:
            sequence = generation.sequence
            limit = generation.limit - generation.sampler.num_output - 1
            guesses = self._drafts.get(sequence.id, ())[:limit]
            sequence.drafts = tuple(draft.token_id for draft in guesses)

    def _sample_slots(self, piece: ScheduledChunk, logits: Tensor, end: int) -> list[SampleSlot]:
        """Returns the completions that choose a token from a piece's rows, which end at row `end`.

        `end` is exclusive. Forks the sequence if several completions share the prompt.
        """
        generation = self._generations[piece.sequence_id]
        sequence, drafts = generation.sequence, generation.sequence.drafts
        computed = piece.start + len(piece.token_ids) - len(drafts)
        if sequence.prompt_rows:
            store_prompt_logprobs(
                generation,
                piece,
                logits[end - piece.num_logit_rows : end],
                num_virtual=len(self._virtual),
            )
        if computed < len(sequence.tokens):
            self.scheduler.advance(sequence, computed)
            return []
        guesses = self._drafts.get(sequence.id, ())[: len(drafts)] if drafts else ()
        slots = [SampleSlot(generation, end - 1 - len(drafts), guesses)]
        if sequence.copies > 1:
            self.scheduler.advance(sequence, computed)
            ids = [self.next_sequence_id() for _ in range(sequence.copies - 1)]
            state = self._requests[generation.request.id]
            for index, child in enumerate(self.scheduler.fork(sequence, ids), start=1):
                other = self._generation(generation.request, index, child, generation.limit)
                state.generations.append(other)
                slots.append(SampleSlot(other, end - 1))
        return slots

    def _finish_step(
        self, slots: list[SampleSlot], events: dict[int, list[TokenEvent]]
    ) -> list[TokenEvent]:
        """Updates the scheduler after sampling, and returns the events to pass to the callers."""
        for slot in slots:
            sequence = slot.generation.sequence
            self.scheduler.advance(sequence, self._computed(slot.generation))
            if slot.generation.finish_reason is not None:
                self._remove_generation(slot.generation)
        return [e for request_id, found in events.items() for e in self._pass_on(request_id, found)]

    def _computed(self, generation: Generation) -> int:
        """Returns how many tokens of a completion are in the cache: all but the last chosen one."""
        sequence = generation.sequence
        return max(sequence.computed, len(sequence.tokens) - 1)

    def _pass_on(self, request_id: int, events: list[TokenEvent]) -> list[TokenEvent]:
        state = self._requests[request_id]
        seen = list(state.pass_on(events))
        if state.finished:
            del self._requests[request_id]
        return seen

    def _remove_generation(self, generation: Generation) -> None:
        """Removes a completion from the scheduler, the engine and the drafter; frees its pages."""
        sequence = generation.sequence
        self.scheduler.remove(sequence)
        del self._generations[sequence.id]
        self._drafts.pop(sequence.id, None)
        if self.drafter is not None:
            self.drafter.forget(sequence.id)


def _usual_cache_dtype(model: Decoder, options: EngineConfig) -> torch.dtype:
    """Returns the default dtype of the cache.

    It is the model's dtype, or bf16 with quantized weights, whose error is far above that of keys
    and values rounded to bf16 (KL divergence in nats, docs/engine.md). In deterministic mode it is
    always the model's dtype, so that scores and completions agree.
    """
    if model.packed_formats() and model.dtype == torch.float32 and not options.deterministic:
        return torch.bfloat16
    return model.dtype


def _has_states(config: ModelConfig) -> bool:
    """Whether a layer has a recurrent state, which shared pages would not include."""
    return any(isinstance(layer.mixer, LinearAttentionConfig) for layer in config.layers)
