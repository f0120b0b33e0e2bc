"""Stop strings in streamed text: text is held back while it may be the start of a stop string.

Each stop string is searched for character by character (Knuth, Morris & Pratt 1977, SIAM J. Comput.
6(2)), so the time is linear in the length of the text, however much is held back.
"""

from collections.abc import Sequence
from functools import lru_cache


class StopStrings:
    """Passes text through until one of `stops` appears, even if it spans several pieces of text.

    Args:
        stops: the stop strings.
        include: whether the stop string itself is passed through too.

    Attributes:
        found: the stop string that has appeared, or None.

    >>> s = StopStrings(["END"])
    >>> s.push("to the E"), s.push("ND of"), s.stopped
    ('to the ', '', True)
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._finders, self._held = [_Finder(stop) for stop in stops], ""
        self._include = include
        self.found: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string has appeared."""
        return self.found is not None

    def push(self, text: str) -> str:
        """Appends text; returns the text that is now certain to precede any stop string."""
        if self.stopped:
            return ""
        ends = [(finder, finder.push(text)) for finder in self._finders]
        held = self._held + text
        starts = [
            (len(self._held) + end - len(finder.stop), finder.stop)
            for finder, end in ends
            if end is not None
        ]
        if starts:
            start, self.found = min(starts)
            self._held = ""
            return held[: start + (len(self.found) if self._include else 0)]
        keep = max((finder.matched for finder in self._finders), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """Returns the text that is still held back; to be called at the end of the text."""
        text, self._held = self._held, ""
        return text


class _Finder:
    """Searches a stream for one stop string.

    Attributes:
        stop: the stop string.
        matched: length of its longest prefix with which the text so far ends.
    """

    def __init__(self, stop: str) -> None:
        self.stop, self.matched = stop, 0
        self._borders = _borders(stop)

    def push(self, text: str) -> int | None:
        """Returns the index in `text` at which the first occurrence ends; None if there is none."""
        for place, character in enumerate(text, start=1):
            self.matched = _longer(self.stop, self._borders, self.matched, character)
            if self.matched == len(self.stop):
                return place
        return None


@lru_cache(maxsize=256)  # shared by the completions of a request
def _borders(stop: str) -> tuple[int, ...]:
    """Returns, for each non-empty prefix of `stop`, the length of its longest proper border.

    A border is a shorter prefix that is also a suffix (the KMP failure function).
    """
    borders = [0]
    for character in stop[1:]:
        borders.append(_longer(stop, borders, borders[-1], character))
    return tuple(borders)


def _longer(stop: str, borders: Sequence[int], matched: int, character: str) -> int:
    """Returns the new number of matched characters of `stop` after the text gets `character`."""
    while matched and stop[matched] != character:
        matched = borders[matched - 1]
    return matched + (stop[matched] == character)
