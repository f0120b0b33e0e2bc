"""Progress lines: content, timing, and rates that exclude work done before a resume."""

import sys
from types import SimpleNamespace

import pytest

from easyllm.core import progress
from easyllm.core.progress import Progress, format_count, format_duration, track


class Clock:
    """A clock that advances only on request."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0s"),
        (0, "0s"),
        (0.6, "1s"),
        (59, "59s"),
        (59.9, "1m00s"),
        (75, "1m15s"),
        (3599, "59m59s"),
        (3600, "1h00m"),
        (7325, "2h02m"),
        (360000, "100h00m"),
    ],
)
def test_a_duration_is_formatted(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (7.25, "7.2"),
        (99.5, "99.5"),
        (123.4, "123"),
        (9999, "9999"),
        (12345, "12.3k"),
        (-12345, "-12.3k"),
        (1234567, "1.2M"),
        (134515008, "134.5M"),
        (2.5e9, "2.5G"),
        (3e12, "3.0T"),
    ],
)
def test_a_count_is_formatted(value, text):
    assert format_count(value) == text


def test_the_line_contains_count_rate_remaining_time_and_fields(clock):
    bar = Progress("training", total=100, unit="step")
    clock.now += 10
    bar.advance(20, loss=2.3141592, lr="1e-4")
    assert bar.line() == "training: 20/100 step · 2 step/s · 40s left · loss 2.314 · lr 1e-4"


def test_a_finished_line_contains_the_total_time(clock):
    bar = Progress("training", total=4, unit="step")
    clock.now += 80
    bar.advance(4)
    assert bar.line() == "training: 4/4 step · 20 s/step · 1m20s"


def test_without_a_total_the_line_contains_the_elapsed_time(clock):
    bar = Progress("reading", unit="row")
    clock.now += 3
    bar.advance(30000)
    assert bar.line() == "reading: 30.0k row · 10.0k row/s · 3s"


def test_work_before_a_resume_is_not_counted_in_the_rate(clock):
    bar = Progress("training", total=100, unit="step")
    bar.skip(50)
    clock.now += 10
    bar.advance(10)
    assert bar.line() == "training: 60/100 step · 1 step/s · 40s left"


def test_a_line_at_the_start_does_not_divide_by_zero(clock):
    bar = Progress("training", total=10, unit="step")
    assert bar.line() == "training: 0/10 step · 0 step/s · 0s"


def test_plain_lines_are_printed_at_intervals_without_a_terminal(clock, monkeypatch, capsys):
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_S", 5.0)
    with Progress("training", total=10, unit="step") as bar:
        for _ in range(10):
            clock.now += 2
            bar.advance()
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert [line.split()[1] for line in lines] == ["3/10", "6/10", "9/10", "10/10"]
    assert "\r" not in captured.err


def test_every_advance_is_printed_at_an_interval_of_zero(clock, monkeypatch, capsys):
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_S", 0.0)
    with Progress("training", total=3, unit="step") as bar:
        for _ in range(3):
            bar.advance()
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_short_work_prints_nothing(clock, capsys):
    with Progress("training", total=2, unit="step") as bar:
        clock.now += 1
        bar.advance(2)
    assert capsys.readouterr().err == ""


def test_failing_work_prints_no_final_line(clock, capsys):
    def fail():
        with Progress("training", total=2, unit="step"):
            clock.now += 60
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_one_line_rewritten(clock, monkeypatch):
    written = []
    terminal = SimpleNamespace(isatty=lambda: True, write=written.append, flush=lambda: None)
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("training", total=2, unit="step") as bar:
        clock.now += 1
        bar.advance(loss=1.25)
        clock.now += 0.01
        bar.advance(loss=1)
    assert len(written) == 2
    assert all(text.startswith("\r") for text in written)
    assert written[-1].endswith("\n")
    assert len(written[-1].strip("\r\n")) >= len(written[0].strip("\r"))


def test_tracking_yields_every_item_and_counts_it(clock, capsys):
    def slow():
        for item in "abc":
            clock.now += 10
            yield item

    assert list(track(slow(), "reading", total=3, unit="row")) == ["a", "b", "c"]
    assert capsys.readouterr().err.splitlines()[-1] == "reading: 3/3 row · 10 s/row · 30s"
