"""Incremental decoding: text as soon as it is sure, never a broken character."""

from typing import Protocol

REPLACEMENT = "\ufffd"


class Decodes(Protocol):
    """Anything that turns ids into text."""

    def decode(self, ids: list[int], *, skip_special: bool = True) -> str: ...


class StreamDecoder:
    """Turns a stream of token ids into a stream of text.

    A character split over several tokens is held back until it is whole. The pieces put together equal
    `decode` of all ids (a decoder may treat the first token specially, so each step decodes a window
    that starts at the last clean boundary).

    Example:
        decoder = StreamDecoder(tokenizer)
        text = "".join(decoder.push(i) for i in ids) + decoder.flush()
    """

    def __init__(self, tokenizer: Decodes, *, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._ids: list[int] = []
        self._window = 0  # start of the decoded window
        self._clean = 0  # the last clean boundary: all text up to here has been given out
        self._given = 0  # characters of the window given out

    def push(self, token_id: int) -> str:
        """The new text that `token_id` makes sure of; may be empty."""
        self._ids.append(token_id)
        text = self._decode(self._window, len(self._ids))
        sure = text.rstrip(REPLACEMENT)  # behind it may be the first bytes of a character
        piece = sure[self._given :]
        self._given += len(piece)
        if piece and len(sure) == len(text):
            self._window, self._clean = self._clean, len(self._ids)
            self._given = len(self._decode(self._window, self._clean))
        return piece

    def flush(self) -> str:
        """Whatever was held back, broken bytes as U+FFFD."""
        piece = self._decode(self._window, len(self._ids))[self._given :]
        self._given += len(piece)
        return piece

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[start:end], skip_special=self._skip_special)
