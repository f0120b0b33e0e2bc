"""The tokens that make up the text of a completion."""

from codecs import getincrementaldecoder
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, replace

from easyllm.engine.request import Logprobs, TokenEvent
from easyllm.tokenizer.stream import REPLACEMENT, StreamDecoder
from easyllm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ContentToken:
    """A token of a completion's content.

    Attributes:
        place: the log-probabilities at the token's position.
        own: the bytes the token adds to the content; None for an id without a token.
        begins: whether the decoder dropped the token's leading space, as sentencepiece's decoder
            does at the start of a text.
    """

    place: Logprobs
    own: bytes | None
    begins: bool = False


class ContentTokens:
    """Finds the tokens that make up a completion's content: their concatenated bytes equal it.

    Tokens of a stop string, the token that ends the completion, and special tokens (which decoding
    omits) are excluded. If a stop string begins inside a token, the bytes before it are included.
    Tokens that contain part of a character are released with the complete character, and text is
    released together with its tokens.

    Args:
        tokenizer: the tokenizer of the model.
        end_ids: ids of the EOS tokens.
        skip_special: whether special tokens are excluded, as they are from the text.
    """

    def __init__(
        self, tokenizer: Tokenizer, end_ids: Collection[int], *, skip_special: bool = True
    ) -> None:
        self._decoder = StreamDecoder(tokenizer, skip_special=skip_special)
        self._bytes, self._end_ids = tokenizer.token_bytes, end_ids
        self._special = tokenizer.special_ids if skip_special else frozenset[int]()
        self._decoded = self._given = self._released = 0  # character counts
        self._text = ""  # received from the engine but not yet released
        self._rest = b""  # trailing bytes not yet known to be a complete or an invalid character
        self._held: list[tuple[bytes | None, Logprobs]] = []  # tokens whose text is not final yet
        self._waiting = deque[
            tuple[int, int, ContentToken]
        ]()  # with the start and end (exclusive) of their characters

    def push(self, event: TokenEvent) -> tuple[str, list[ContentToken]]:
        """Takes the next event and returns released text of the content with its tokens."""
        token, place = event.token_id, event.logprobs
        finished = event.finish_reason is not None
        piece = self._decoder.push(token) if token is not None else ""
        ends = event.finish_reason == "stop" and token in self._end_ids
        if place is not None and not ends and place.token_id not in self._special:
            self._held.append((self._bytes(place.token_id), place))
        if finished:
            piece += self._decoder.flush()
        if piece or finished:
            self._place(piece)
        self._given += len(event.text)
        self._text += event.text
        ready, upto = [], self._released
        while self._waiting and self._waiting[0][0] < self._given:
            start, end, content = self._waiting[0]
            if end > self._given and not finished:
                break
            if end > self._given and content.own is not None:
                content = replace(content, own=_cut(content.own, self._given - start))
            ready.append(content)
            upto = max(upto, min(end, self._given))
            self._waiting.popleft()
        if finished or not self._waiting or self._waiting[0][0] >= self._given:
            upto = self._given
        text = self._text[: upto - self._released]
        self._text, self._released = self._text[len(text) :], upto
        return text, ready

    def _place(self, piece: str) -> None:
        """Assigns the held tokens to the characters of `piece`, the text they decode to."""
        before, last = self._rest, max(len(piece) - 1, 0)
        owns = [own or b"" for own, _ in self._held]
        drops = self._decoded == 0 and _blanks(b"".join(owns)) > _blanks(piece.encode())
        for own, place in self._held:
            begins = drops and bool(own)
            if begins and own is not None:
                own, drops = own[1:], False
            start = min(_characters(before, own or b""), last)
            before += own or b""
            end = min(max(len(before.decode("utf-8", "replace")), start), len(piece))
            content = ContentToken(place, own, begins)
            self._waiting.append((self._decoded + start, self._decoded + end, content))
        self._rest = _undecided(before)
        self._decoded += len(piece)
        self._held = []


def _blanks(text: bytes) -> int:
    return len(text) - len(text.lstrip(b" "))


def _cut(own: bytes, length: int) -> bytes:
    """Returns a token's bytes up to `length` characters; its first character may start earlier."""
    head = 0
    while head < len(own) and own[head] & 0xC0 == 0x80:
        head += 1
    length -= bool(head)
    end = len(own)
    while end > head and len(own[head:end].decode("utf-8", "replace")) > length:
        end -= 1
    return own[:end]


def _characters(before: bytes, own: bytes) -> int:
    """Returns how many characters of `before` end before `own`, which may continue the last one."""
    continues = bool(own) and own[0] & 0xC0 == 0x80
    return len(getincrementaldecoder("utf-8")("replace").decode(before, final=not continues))


def _undecided(data: bytes) -> bytes:
    """Returns the trailing bytes that do not form a complete character."""
    end = len(data)
    while end and data[:end].decode("utf-8", "replace").endswith(REPLACEMENT):
        end -= 1
    return data[end:]
