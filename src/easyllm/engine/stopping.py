"""Stop strings in a stream of text: held back while they may be beginning, never given out.

Each stop string is looked for character by character (Knuth, Morris & Pratt 1977, SIAM J. Comput. 6(2)), so the time is
linear in the text, whatever is held back.
"""

from collections.abc import Sequence
from functools import lru_cache


class StopStrings:
    """Passes text through until one of `stops` appears, across piece boundaries too.

    >>> s = StopStrings(["END"])
    >>> s.push("to the E"), s.push("ND of"), s.stopped
    ('to the ', '', True)
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._finders, self._held = [_Finder(stop) for stop in stops], ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The part of the text so far that is sure to come before any stop string."""
        if self.stopped:
            return ""
        ends = [(finder, finder.push(text)) for finder in self._finders]
        held = self._held + text
        starts = [
            len(self._held) + end - len(finder.stop) for finder, end in ends if end is not None
        ]
        if starts:
            self.stopped, self._held = True, ""
            return held[: min(starts)]
        keep = max((finder.matched for finder in self._finders), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        text, self._held = self._held, ""
        return text


class _Finder:
    """Looks for one stop string in a stream; `matched` characters of it end the text so far."""

    def __init__(self, stop: str) -> None:
        self.stop, self.matched = stop, 0
        self._borders = _borders(stop)

    def push(self, text: str) -> int | None:
        """Where in `text` the first occurrence ends; None where it does not."""
        for place, character in enumerate(text, start=1):
            self.matched = _longer(self.stop, self._borders, self.matched, character)
            if self.matched == len(self.stop):
                return place
        return None


@lru_cache(maxsize=256)  # the completions of a request share their tables
def _borders(stop: str) -> tuple[int, ...]:
    """For each beginning of `stop`, of 1 character and more, the longest shorter one that also ends it."""
    borders = [0]
    for character in stop[1:]:
        borders.append(_longer(stop, borders, borders[-1], character))
    return tuple(borders)


def _longer(stop: str, borders: Sequence[int], matched: int, character: str) -> int:
    """How many characters of `stop` end the text when `matched` did and `character` comes behind it."""
    while matched and stop[matched] != character:
        matched = borders[matched - 1]
    return matched + (stop[matched] == character)
