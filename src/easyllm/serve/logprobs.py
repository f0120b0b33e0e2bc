"""Log-probabilities of the tokens of an answer, in OpenAI's form."""

from collections import deque
from collections.abc import Collection, Sequence

from easyllm.engine.request import Logprobs, TokenEvent
from easyllm.serve.answers import ChoiceLogprobs, TokenLogprob, TopLogprob
from easyllm.tokenizer.stream import StreamDecoder
from easyllm.tokenizer.token_bytes import shown
from easyllm.tokenizer.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
"""What OpenAI writes for "very unlikely"; JSON has no -inf."""


class ContentTokens:
    """Finds the tokens that make up one answer's content, and only those.

    A token is in the content once text that begins with it or after it has been given out. So a token of a stop
    string, the token that ends the answer, and control tokens (which decoding leaves out) are not; tokens that hold a
    piece of a character come with the text of the whole one.

    Args:
        tokenizer: of the answer.
        end_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, end_ids: Collection[int]) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._special, self._end_ids = tokenizer.special_ids, end_ids
        self._decoded = self._given = 0  # characters
        self._waiting = deque[tuple[int, Logprobs]]()  # with the character each token begins at

    def push(self, event: TokenEvent) -> list[Logprobs]:
        """Takes the answer's next event in; gives the tokens that its text makes part of the content."""
        token = event.token_id
        if token is not None:
            start = self._decoded
            self._decoded += len(self._decoder.push(token))
            ends = event.finish_reason == "stop" and token in self._end_ids
            if event.logprobs is not None and token not in self._special and not ends:
                self._waiting.append((start, event.logprobs))
        self._given += len(event.text)
        ready = []
        while self._waiting and self._waiting[0][0] < self._given:
            ready.append(self._waiting.popleft()[1])
        return ready


def choice_logprobs(tokens: Sequence[Logprobs], tokenizer: Tokenizer) -> ChoiceLogprobs:
    """Raw log-probabilities (nats) of tokens, each with the most likely ones at its place."""

    def entry(token_id: int, logprob: float) -> TopLogprob:
        own = tokenizer.token_bytes(token_id)
        return TopLogprob(
            token=shown(own or b""),
            bytes=None if own is None else list(own),
            logprob=max(logprob, LEAST_LOGPROB),
        )

    return ChoiceLogprobs(
        content=[
            TokenLogprob(
                **entry(place.token_id, place.raw).model_dump(),
                top_logprobs=[entry(*other) for other in place.top_raw],
            )
            for place in tokens
        ]
    )
