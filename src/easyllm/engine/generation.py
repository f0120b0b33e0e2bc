"""State of one completion: appends tokens, emits text that is final, and detects its end."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from easyllm.engine.request import FinishReason, Logprobs, Request, TokenEvent, TokenMask
from easyllm.engine.sampling import SampledToken, SamplerState, new_rng
from easyllm.engine.scheduler import Sequence
from easyllm.engine.stopping import StopStrings
from easyllm.tokenizer.stream import StreamDecoder
from easyllm.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Generation:
    """One completion of a request.

    Attributes:
        request: the request.
        index: index of this completion among those of the request.
        sequence: its tokens, for the scheduler.
        sampler: chooses its tokens; shares the list of tokens with `sequence`.
        decoder: decodes its tokens to text incrementally.
        stops: detects its stop strings.
        limit: maximum number of tokens to generate.
        prompt_logprobs: log-probabilities of the prompt tokens computed so far, by position; None
            if not requested.
        finish_reason: set once it has ended.
    """

    request: Request
    index: int
    sequence: Sequence
    sampler: SamplerState
    decoder: StreamDecoder
    stops: StopStrings
    limit: int
    prompt_logprobs: dict[int, Logprobs] | None = None
    finish_reason: FinishReason | None = None

    def take(self, choice: SampledToken) -> TokenEvent:
        """Appends the chosen token; returns the event with its new text and finish reason."""
        first = self.sampler.num_output == 0
        if choice.token_id is None:
            text = self.decoder.flush()
            self.finish_reason = "cancelled" if self.sampler.failed else "stop"
        else:
            self.sampler.push(choice.token_id)
            text = self._text(choice.token_id)
        free = self.sampler.num_output < self.sampler.params.min_tokens
        text = text if free else self.stops.push(text)
        if self.stops.stopped:
            self.finish_reason = "stop"
        elif self.finish_reason is not None:
            text += self.stops.flush()
        return TokenEvent(
            request_id=self.request.id,
            token_id=choice.token_id,
            text=text,
            logprob=choice.logprob,
            finish_reason=self.finish_reason,
            index=self.index,
            logprobs=choice.logprobs,
            prompt_logprobs=self._prompt() if first else None,
            stop=self._stop(choice.token_id),
            cached_tokens=(self.sequence.cached or 0) if first else 0,
        )

    def _stop(self, token_id: int | None) -> str | int | None:
        """Returns what ended the completion, if the request named it."""
        if self.stops.stopped:
            return self.stops.found
        named = self.sampler.params.stop_token_ids
        return token_id if self.finish_reason == "stop" and token_id in named else None

    def _text(self, token_id: int) -> str:
        """Returns the new text of a token already appended; sets the finish reason."""
        if token_id in self.sampler.end_ids:
            self.finish_reason = "stop"
            return self.decoder.flush()
        text = self.decoder.push(token_id)
        if self.sampler.num_output >= self.limit:
            self.finish_reason = "length"
            text += self.decoder.flush()
        return text

    def _prompt(self) -> tuple[Logprobs, ...] | None:
        """Returns the log-probabilities of the prompt tokens after the first, in order."""
        if self.prompt_logprobs is None:
            return None
        return tuple(self.prompt_logprobs[i] for i in sorted(self.prompt_logprobs))


def new_generation(
    request: Request,
    index: int,
    sequence: Sequence,
    limit: int,
    *,
    tokenizer: Tokenizer,
    end_ids: Iterable[int],
    num_virtual: int,
) -> Generation:
    """Returns the state of a completion that has no token yet.

    Args:
        request: the request.
        index: index of the completion among those of the request.
        sequence: its tokens, for the scheduler; they start with the prompt.
        limit: maximum number of tokens to generate.
        tokenizer: decodes its tokens.
        end_ids: the model's EOS ids, which `ignore_eos` ignores.
        num_virtual: number of virtual tokens before the prompt.
    """
    params = request.params
    mask, failed = _start_mask(request)
    sampler = SamplerState(
        params=params,
        source=new_rng(params.seed, index),
        token_ids=sequence.tokens,
        prompt_start=num_virtual,
        output_start=sequence.prompt_length,
        end_ids=frozenset((*(() if params.ignore_eos else end_ids), *params.stop_token_ids)),
        mask=mask,
        failed=failed,
    )
    return Generation(
        request=request,
        index=index,
        sequence=sequence,
        sampler=sampler,
        decoder=StreamDecoder(tokenizer, skip_special=params.skip_special_tokens),
        stops=StopStrings(params.stop, include=params.include_stop),
        limit=limit,
        prompt_logprobs={} if sequence.prompt_rows else None,
    )


def _start_mask(request: Request) -> tuple[TokenMask | None, bool]:
    """Returns the token mask of one completion, and whether creating it failed.

    A failure ends only that completion.
    """
    try:
        return None if request.mask is None else request.mask.start(), False
    except Exception:
        logger.exception("a token mask could not be created; its completion ends")
        return None, True


@dataclass(slots=True, eq=False)
class RequestState:
    """All completions of a request.

    Attributes:
        request: the request.
        generations: its completions so far.
        held: with `best_of`, the events of each completion, buffered until the best are known.
    """

    request: Request
    generations: list[Generation]
    held: dict[int, list[TokenEvent]] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether all completions have ended."""
        wanted = self.request.params.num_sequences
        ended = sum(g.finish_reason is not None for g in self.generations)
        return ended == wanted

    def pass_on(self, events: Iterable[TokenEvent]) -> Iterator[TokenEvent]:
        """Yields the events to pass to the caller now.

        Without `best_of` these are all `events`; with `best_of` the events of the best completions
        once all have ended.
        """
        params = self.request.params
        if params.num_sequences == params.n:
            yield from events
            return
        for event in events:
            self.held.setdefault(event.index, []).append(event)
        if self.finished:
            ranked = sorted(self.held.values(), key=_mean_logprob, reverse=True)
            for index, chosen in enumerate(ranked[: params.n]):
                yield from (replace(event, index=index) for event in chosen)

    def cancelled_events(self) -> list[TokenEvent]:
        """Returns the last events of completions that end without a request of their caller."""
        params = self.request.params
        ended = {each.index for each in self.generations if each.finish_reason is not None}
        if params.num_sequences != params.n:  # none of their events have been passed on
            ended = set()
        return [
            TokenEvent(
                request_id=self.request.id,
                token_id=None,
                text="",
                logprob=0.0,
                finish_reason="cancelled",
                index=index,
            )
            for index in range(params.n)
            if index not in ended
        ]


def _mean_logprob(events: list[TokenEvent]) -> float:
    """Returns the mean log-probability per token, by which `best_of` ranks completions."""
    values = [event.logprob for event in events if event.token_id is not None]
    return sum(values) / len(values) if values else float("-inf")
