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
        self._sent = 0  # ids up to here have been given out

    def push(self, token_id: int) -> str:
        """The new text that `token_id` makes sure of; may be empty."""
        self._ids.append(token_id)
        before, now = self._texts()
        if now.endswith(REPLACEMENT) and len(self._ids) - self._sent < 8:
            return ""  # perhaps the first bytes of a character (a character has at most 4 bytes)
        return self._give(before, now)

    def flush(self) -> str:
        """Whatever was held back, broken bytes as U+FFFD."""
        before, now = self._texts()
        return self._give(before, now)

    def _texts(self) -> tuple[str, str]:
        window = self._ids[self._window :]
        sent = self._ids[self._window : self._sent]
        before = self._tokenizer.decode(sent, skip_special=self._skip_special)
        return before, self._tokenizer.decode(window, skip_special=self._skip_special)

    def _give(self, before: str, now: str) -> str:
        self._window, self._sent = self._sent, len(self._ids)
        return now[len(before) :]
