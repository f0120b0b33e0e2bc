"""The text of an output as it arrives, and readers that wait for more of it.

A reader is a generator: it yields when it needs more text, and is resumed when there is some. So a
parser is written as if the whole text were there, and its result does not depend on how the text is
divided. Everything is read once, from left to right.
"""

import re
from collections.abc import Callable, Generator, Iterable
from typing import TypeAlias, TypeVar

Result = TypeVar("Result")
Steps: TypeAlias = Generator[None, None, Result]
Sink: TypeAlias = Callable[[str], None]
WHITESPACE = " \t\r\n"


class Malformed(Exception):
    """The text is not what the reader expects; it was read up to the unexpected character."""


class Source:
    """Text that arrives in parts.

    Attributes:
        ended: whether the text is complete.
    """

    def __init__(self) -> None:
        self.ended = False
        self._text = ""
        self._at = 0
        self._record: list[str] | None = None

    def push(self, text: str) -> None:
        """Appends text."""
        self._text = self._text[self._at :] + text
        self._at = 0

    @property
    def available(self) -> int:
        """Number of characters that have arrived and were not read."""
        return len(self._text) - self._at

    def ahead(self, length: int) -> str:
        """Returns the next characters without reading them, fewer if not all have arrived."""
        return self._text[self._at : self._at + length]

    def take(self, length: int) -> str:
        """Reads the next characters, which have arrived."""
        piece = self._text[self._at : self._at + length]
        self._at += length
        if self._record is not None:
            self._record.append(piece)
        return piece

    def start_recording(self) -> None:
        """From now on, remembers what is read."""
        self._record = []

    def stop_recording(self) -> str:
        """Returns what was read since `start_recording`; empty if nothing was recorded."""
        text, self._record = "".join(self._record or ()), None
        return text

    def wait_for(self, length: int) -> Steps[str]:
        """Returns the next characters without reading them; fewer only at the end."""
        while self.available < length and not self.ended:
            yield
        return self.ahead(length)

    def run_of(self, characters: re.Pattern[str], sink: Sink | None = None) -> Steps[None]:
        """Reads as many characters as match a pattern of single characters, repeated."""
        while True:
            match = characters.match(self._text, self._at)
            length = 0 if match is None else match.end() - self._at
            is_at_end = length == self.available
            piece = self.take(length)
            if sink is not None and piece:
                sink(piece)
            if not is_at_end or self.ended:
                return
            yield

    def spaces(self, sink: Sink | None = None) -> Steps[None]:
        """Reads whitespace."""
        yield from self.run_of(_SPACES, sink)

    def expect(self, *texts: str) -> Steps[str]:
        """Reads the first of several texts that comes next, of which none begins another.

        Raises:
            Malformed: none of them is next.
        """
        found = yield from self.optional(*texts)
        if not found:
            raise Malformed
        return found

    def optional(self, *texts: str) -> Steps[str]:
        """Reads one of several texts if it comes next; returns "" if none does."""
        while True:
            open_texts = [t for t in texts if t.startswith(self.ahead(len(t)))]
            for text in open_texts:
                if self.available >= len(text):
                    return self.take(len(text))
            if not open_texts or self.ended:
                return ""
            yield

    def closing(self, *texts: str) -> Steps[str]:
        """Reads one of several closing marks as `optional` does, and one that the end cuts off."""
        found = yield from self.optional(*texts)
        rest = self.ahead(self.available)
        if not found and rest and self.ended and any(text.startswith(rest) for text in texts):
            self.take(len(rest))
        return found

    def until(self, marks: "Marks", sink: Sink) -> Steps[str]:
        """Reads up to and including the first mark, and returns it; "" at the end of the text.

        The text before the mark is passed to the sink as it arrives.
        """
        while True:
            place, mark = marks.find(self._text, self._at, final=self.ended)
            if place > self._at:
                sink(self.take(place - self._at))
            if mark:
                return self.take(len(mark))
            if self.ended:
                return ""
            yield


class Marks:
    """A set of texts to search for: the leftmost one is found, and the longest at its place."""

    def __init__(self, texts: Iterable[str]) -> None:
        chosen = sorted({text for text in texts if text}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, chosen)) or r"(?!)")
        self._beginnings = {text[:n] for text in chosen for n in range(1, len(text))}
        self._longest = max(map(len, chosen), default=1)

    def find(self, text: str, start: int, *, final: bool) -> tuple[int, str]:
        """Returns where the first mark begins, and the mark.

        If no mark is certain, returns the place from which the text may begin one (the length of
        the text, if there is none) and "".

        Args:
            text: the text, which may continue.
            start: where to begin.
            final: whether the text is complete.
        """
        match = self._pattern.search(text, start)
        place = len(text) if match is None else match.start()
        if not final:
            for at in range(max(start, len(text) - self._longest + 1), min(place + 1, len(text))):
                if text[at:] in self._beginnings:
                    return at, ""
        return place, "" if match is None else match.group()


_SPACES = re.compile(r"[ \t\r\n]+")
