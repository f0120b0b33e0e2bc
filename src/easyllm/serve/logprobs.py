"""Log-probabilities of the tokens of an answer, in OpenAI's form."""

from codecs import getincrementaldecoder
from collections import deque
from collections.abc import Collection, Sequence

from easyllm.engine.request import Logprobs, TokenEvent
from easyllm.serve.answers import ChoiceLogprobs, TokenLogprob, TopLogprob
from easyllm.tokenizer.stream import REPLACEMENT, StreamDecoder
from easyllm.tokenizer.token_bytes import shown
from easyllm.tokenizer.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
"""What OpenAI writes for "very unlikely"; JSON has no -inf."""


class ContentTokens:
    """Finds the tokens that make up one answer's content, and only those.

    A token is in the content once text has been given out at or after the character it begins at. So a token of a stop
    string, the token that ends the answer, and control tokens (which decoding leaves out) are not; tokens that hold a
    piece of a character come with the text of the whole one.

    Args:
        tokenizer: of the answer.
        end_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, end_ids: Collection[int]) -> None:
        self._decoder, self._bytes = StreamDecoder(tokenizer), tokenizer.token_bytes
        self._special, self._end_ids = tokenizer.special_ids, end_ids
        self._decoded = self._given = 0  # characters
        self._rest = b""  # of earlier tokens, not yet known to be a character or broken
        self._held: list[tuple[bytes, Logprobs]] = []  # tokens since text was last sure
        self._waiting = deque[tuple[int, Logprobs]]()  # with the character each token begins at

    def push(self, event: TokenEvent) -> list[Logprobs]:
        """Takes the answer's next event in; gives the tokens that its text makes part of the content."""
        token, place = event.token_id, event.logprobs
        piece = self._decoder.push(token) if token is not None else ""
        ends = event.finish_reason == "stop" and token in self._end_ids
        if place is not None and not ends and place.token_id not in self._special:
            self._held.append((self._bytes(place.token_id) or b"", place))
        if event.finish_reason is not None:
            piece += self._decoder.flush()
        if piece or event.finish_reason is not None:
            self._place(len(piece))
        self._given += len(event.text)
        ready = []
        while self._waiting and self._waiting[0][0] < self._given:
            ready.append(self._waiting.popleft()[1])
        return ready

    def _place(self, length: int) -> None:
        """Finds where the held tokens begin in the `length` characters of text they are sure to have become."""
        before = self._rest
        for own, place in self._held:
            inside = min(_characters(before, own), max(length - 1, 0))
            self._waiting.append((self._decoded + inside, place))
            before += own
        self._rest = _undecided(before)
        self._decoded += length
        self._held = []


def _characters(before: bytes, own: bytes) -> int:
    """Characters of `before` that are finished where `own` begins; it may go on with the last one."""
    continues = bool(own) and own[0] & 0xC0 == 0x80
    return len(getincrementaldecoder("utf-8")("replace").decode(before, final=not continues))


def _undecided(data: bytes) -> bytes:
    """The bytes at the end that are not a whole character."""
    end = len(data)
    while end and data[:end].decode("utf-8", "replace").endswith(REPLACEMENT):
        end -= 1
    return data[end:]


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
