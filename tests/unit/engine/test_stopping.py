"""Stop strings: same result as searching the complete text, for any chunking, in linear time."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from easyllm.engine.params import MAX_STOP_CHARS, SamplingParams
from easyllm.engine.stopping import StopStrings


class Naive:
    """The definition: text before the first stop string that cannot be the start of one."""

    def __init__(self, stops):
        self.stops, self.text, self.given, self.stopped = stops, "", 0, False

    def push(self, piece):
        self.text += "" if self.stopped else piece
        hits = [i for stop in self.stops if (i := self.text.find(stop)) >= 0]
        self.stopped = bool(hits)
        beginnings = [
            place
            for place in range(self.given, len(self.text))
            if any(stop.startswith(self.text[place:]) for stop in self.stops)
        ]
        sure = min(hits or beginnings, default=len(self.text))
        piece, self.given = self.text[self.given : sure], sure
        return piece

    def flush(self):
        return "" if self.stopped else self.text[self.given :]


LETTERS = st.text("ab\n界", max_size=9)
STOPS = st.lists(st.text("ab\n界", min_size=1, max_size=6), max_size=4)


@given(STOPS, st.lists(LETTERS, max_size=12))
def test_incremental_search_equals_a_search_of_the_complete_text(stops, pieces):
    ours, naive = StopStrings(stops), Naive(stops)
    for piece in pieces:
        assert (ours.push(piece), ours.stopped) == (naive.push(piece), naive.stopped)
    assert ours.flush() == naive.flush()


def test_the_time_is_linear_in_the_text_for_any_held_back_text():
    """One stop string holds all text back, the other never matches.

    Both are longer than a request allows, to make a quadratic time visible.
    """
    stops = StopStrings(["a" * 50_000, "x" * 50_000])
    begin = time.perf_counter()
    for _ in range(2_000):
        assert stops.push("a" * 20) == ""
    assert stops.push("b") == "a" * 40_000 + "b"
    assert (
        time.perf_counter() - begin < 5
    )  # comparing all held text at each chunk takes half a minute


def test_stop_strings_have_a_maximum_length():
    assert SamplingParams(stop=("x" * MAX_STOP_CHARS,)).stop
    with pytest.raises(ValueError, match="should have at most 1000 characters"):
        SamplingParams(stop=("x" * (MAX_STOP_CHARS + 1),))
