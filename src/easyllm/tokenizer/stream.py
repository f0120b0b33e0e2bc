"""Incremental (streaming) decoding that never emits an incomplete character."""

from typing import Protocol

REPLACEMENT = "\ufffd"


class Decodes(Protocol):
    """Anything that decodes ids to text."""

    def decode(self, ids: list[int], *, skip_special: bool = True) -> str:
        """Returns the text of `ids`."""
        ...


class StreamDecoder:
    """Converts a stream of token ids to a stream of text.

    A character split over several tokens is held back until it is complete. The concatenated pieces
    equal `decode` of all ids. A decoder may treat the first token specially, so each step decodes a
    window that starts at the second-to-last clean boundary.

    Args:
        tokenizer: decodes the ids.
        skip_special: whether special tokens are omitted from the text.

    Example:
        decoder = StreamDecoder(tokenizer)
        text = "".join(decoder.push(i) for i in ids) + decoder.flush()
    """

    def __init__(self, tokenizer: Decodes, *, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._ids: list[int] = []
        self._window = 0  # start of the decoded window
        self._clean = 0  # the last clean boundary: all text before it has been returned
        self._given = 0  # number of characters of the window that have been returned

    def push(self, token_id: int) -> str:
        """Adds a token and returns the text that it completes; may be empty."""
        self._ids.append(token_id)
        text = self._decode(self._window, len(self._ids))
        sure = text.rstrip(REPLACEMENT)  # U+FFFD at the end may be an incomplete character
        piece = sure[self._given :]
        self._given += len(piece)
        if piece and len(sure) == len(text):
            self._window, self._clean = self._clean, len(self._ids)
            self._given = len(self._decode(self._window, self._clean))
        return piece

    def flush(self) -> str:
        """Returns the text that was held back, with invalid bytes as U+FFFD."""
        piece = self._decode(self._window, len(self._ids))[self._given :]
        self._given += len(piece)
        return piece

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[start:end], skip_special=self._skip_special)
