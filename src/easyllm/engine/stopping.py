"""Stop strings in a stream of text: held back while they may be beginning, never given out."""

from collections.abc import Sequence


class StopStrings:
    """Passes text through until one of `stops` appears, across piece boundaries too.

    >>> s = StopStrings(["END"])
    >>> s.push("to the E"), s.push("ND of"), s.stopped
    ('to the ', '', True)
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = tuple(stops), ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The part of the text so far that is sure to come before any stop string."""
        if self.stopped:
            return ""
        held = self._held + text
        hits = [i for stop in self._stops if (i := held.find(stop)) >= 0]
        if hits:
            self.stopped, self._held = True, ""
            return held[: min(hits)]
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
