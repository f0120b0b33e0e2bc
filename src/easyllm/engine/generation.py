"""One completion as it grows: tokens in, sure text out, and when it ends."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from easyllm.engine.request import FinishReason, Logprobs, Request, TokenEvent
from easyllm.engine.sampling import Choice, Chooser
from easyllm.engine.scheduler import Sequence
from easyllm.engine.stopping import StopStrings
from easyllm.tokenizer.stream import StreamDecoder


@dataclass(slots=True, eq=False)
class Generation:
    """One completion of a request.

    Attributes:
        index: which of the request's completions.
        sequence: its tokens, for the scheduler.
        chooser: how its tokens are chosen; it shares the list of tokens with `sequence`.
        limit: most tokens to generate.
        prompt_logprobs: of the prompt's tokens, by their place, while they are computed; None where not asked for.
        finish_reason: once it has ended.
    """

    request: Request
    index: int
    sequence: Sequence
    chooser: Chooser
    decoder: StreamDecoder
    stops: StopStrings
    limit: int
    prompt_logprobs: dict[int, Logprobs] | None = None
    finish_reason: FinishReason | None = None

    def take(self, choice: Choice) -> TokenEvent:
        """Takes the next token in; the event says what it gave and whether it was the last."""
        first = self.chooser.num_output == 0
        if choice.token_id is None:
            text = self.decoder.flush()
            self.finish_reason = "cancelled" if self.chooser.failed else "stop"
        else:
            self.chooser.push(choice.token_id)
            text = self._text(choice.token_id)
        free = self.chooser.num_output < self.chooser.params.min_tokens
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
        )

    def _text(self, token_id: int) -> str:
        """New text of a token that is in already; sets why it ends."""
        if token_id in self.chooser.end_ids:
            self.finish_reason = "stop"
            return self.decoder.flush()
        text = self.decoder.push(token_id)
        if self.chooser.num_output >= self.limit:
            self.finish_reason = "length"
            text += self.decoder.flush()
        return text

    def _prompt(self) -> tuple[Logprobs, ...] | None:
        """Those of the prompt's tokens after the first, in their order."""
        if self.prompt_logprobs is None:
            return None
        return tuple(self.prompt_logprobs[i] for i in sorted(self.prompt_logprobs))


@dataclass(slots=True, eq=False)
class RequestState:
    """All completions of a request, and with `best_of` their events until the best are known."""

    request: Request
    generations: list[Generation]
    held: dict[int, list[TokenEvent]] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether every completion has ended."""
        wanted = self.request.params.num_sequences
        ended = sum(g.finish_reason is not None for g in self.generations)
        return ended == wanted

    def pass_on(self, events: Iterable[TokenEvent]) -> Iterator[TokenEvent]:
        """The events a caller sees now: all as they come, or with `best_of` those of the best once all have ended."""
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


def _mean_logprob(events: list[TokenEvent]) -> float:
    """Log-probability a token, the measure of `best_of`."""
    values = [event.logprob for event in events if event.token_id is not None]
    return sum(values) / len(values) if values else float("-inf")
