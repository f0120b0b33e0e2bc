"""The completion of a prompt, collected from the events of its tokens."""

from dataclasses import dataclass, field

from easyllm.engine.request import FinishReason, Logprobs, TokenEvent


@dataclass(slots=True)
class Completion:
    """The completion of a prompt.

    Attributes:
        text: generated text.
        token_ids: generated tokens.
        logprobs: log-probability of each token in nats, under the model's own (raw) distribution.
        finish_reason: why generation ended; None while it is running.
        details: for each token, its `Logprobs`, if requested with `SamplingParams.logprobs`.
        prompt_logprobs: `Logprobs` of each prompt token after the first, if requested.
        others: the other completions of the same prompt, with `n` > 1.
        score: beam search only: the score by which hypotheses are ranked.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    details: list[Logprobs] = field(default_factory=list)
    prompt_logprobs: tuple[Logprobs, ...] | None = None
    others: list["Completion"] = field(default_factory=list)
    score: float | None = None

    def take(self, event: TokenEvent) -> None:
        """Adds one event, to this completion or to that of `others` to which it belongs."""
        if event.index:
            while len(self.others) < event.index:
                self.others.append(Completion())
            self.others[event.index - 1]._add(event)
        else:
            self._add(event)

    def _add(self, event: TokenEvent) -> None:
        self.text += event.text
        if event.token_id is not None:
            self.token_ids.append(event.token_id)
            self.logprobs.append(event.logprob)
        if event.logprobs is not None:
            self.details.append(event.logprobs)
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs
        self.finish_reason = event.finish_reason


__all__ = ["Completion"]
