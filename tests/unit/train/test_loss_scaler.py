"""The loss scaler's trace: worked out by hand, and compared with DeepSpeed's rule."""

import itertools
import random

import pytest

from easyllm.core.errors import ConfigError
from easyllm.train.loss_scaler import LossScaler


def trace(scaler, overflows):
    """Returns the scale after each step."""
    return [(scaler.update(overflow), scaler.scale)[1] for overflow in overflows]


def expected_trace(overflows, *, initial, window, hysteresis, minimum, consecutive=False):
    """Computes DeepSpeed's `DynamicLossScaler.update_scale` from its description and the history.

    A step's iteration number is its index. With `last` the last overflow before it (or -1), the
    number of steps in between is `interval = i - last - 1`; a clean step where that is a positive
    multiple of the window doubles the scale and refills the hysteresis. An overflow halves the
    scale if at most one unit of hysteresis remains, and otherwise uses up one unit.
    """
    scales, scale = [], initial
    for i, overflow in enumerate(overflows):
        last = max((j for j in range(i) if overflows[j]), default=-1)
        interval = i - last - 1
        if not overflow:
            if interval > 0 and interval % window == 0:
                scale *= 2
        else:
            refill = _last_refill(overflows[:i], window, consecutive)
            used = sum(overflows[refill:i])
            if used >= hysteresis - 1:
                scale = max(scale / 2, minimum)
        scales.append(scale)
    return scales


def _last_refill(overflows, window, consecutive):
    """Returns the index after the last step that refilled the hysteresis; 0 if there is none."""
    found = 0
    for i, overflow in enumerate(overflows):
        last = max((j for j in range(i) if overflows[j]), default=-1)
        interval = i - last - 1
        doubled = interval > 0 and interval % window == 0
        if not overflow and (doubled or consecutive):
            found = i + 1
    return found


def test_the_defaults_equal_deepspeeds():
    scaler = LossScaler()
    assert scaler.scale == 65536
    assert (scaler.window, scaler.hysteresis, scaler.min_scale, scaler.factor) == (1000, 2, 1, 2)
    assert trace(scaler, [True, True, True]) == [65536, 32768, 16384]


def test_exactly_the_overflowed_steps_are_skipped():
    scaler = LossScaler()
    pattern = [False, True, True, False, True, False]
    assert [scaler.update(overflow) for overflow in pattern] == pattern


def test_the_scale_is_first_doubled_at_step_1001():
    scaler = LossScaler()
    scales = trace(scaler, [False] * 2001)
    assert scales[999] == 65536
    assert scales[1000] == 131072
    assert scales[1999] == 131072
    assert scales[2000] == 262144


@pytest.mark.parametrize(
    ("steps", "scales"),
    [
        # X overflows, . does not; window 3, hysteresis 2, initial scale 16
        ("X", [16]),  # uses up the one free overflow
        ("XXX", [16, 8, 4]),
        ("X.X", [16, 16, 8]),  # a clean step does not refill the hysteresis
        ("X....X", [16, 16, 16, 16, 32, 32]),  # doubling refills it: the next overflow is free
        ("X....XX", [16, 16, 16, 16, 32, 32, 16]),
        ("XX....", [16, 8, 8, 8, 8, 16]),
        ("...X...X", [16, 16, 16, 16, 16, 16, 16, 8]),  # three are too few, also at the start
        (".......", [16, 16, 16, 32, 32, 32, 64]),
        ("XXXXX", [16, 8, 4, 2, 1]),
    ],
)
def test_traces_match_those_worked_out_by_hand(steps, scales):
    scaler = LossScaler(initial_scale=16, window=3, hysteresis=2)
    assert trace(scaler, [step == "X" for step in steps]) == scales


def test_consecutive_hysteresis_is_refilled_by_any_clean_step():
    scaler = LossScaler(initial_scale=16, window=3, hysteresis=2, consecutive_hysteresis=True)
    assert trace(scaler, [step == "X" for step in "X.X.XX"]) == [16, 16, 16, 16, 16, 8]


@pytest.mark.parametrize("consecutive", [False, True])
@pytest.mark.parametrize(("window", "hysteresis"), [*itertools.product([1, 2, 5, 20], [1, 2, 3])])
def test_random_traces_equal_deepspeeds_rule(window, hysteresis, consecutive):
    generator = random.Random(1000 * window + hysteresis)
    for rate in (0.02, 0.2, 0.5):
        overflows = [generator.random() < rate for _ in range(150)]
        scaler = LossScaler(
            initial_scale=2.0**200,
            window=window,
            hysteresis=hysteresis,
            consecutive_hysteresis=consecutive,
        )
        assert trace(scaler, overflows) == expected_trace(
            overflows,
            initial=2.0**200,
            window=window,
            hysteresis=hysteresis,
            minimum=1.0,
            consecutive=consecutive,
        )


def test_the_scale_stops_at_its_minimum_and_an_overflow_there_is_an_error():
    scaler = LossScaler(initial_scale=3.0, hysteresis=1, min_scale=2.0)
    assert trace(scaler, [True]) == [2.0]
    with pytest.raises(ConfigError, match="overflow fp16 even at the minimum loss scale, 2"):
        scaler.update(True)


def test_a_restored_scaler_continues_as_if_uninterrupted():
    generator = random.Random(3)
    overflows = [generator.random() < 0.15 for _ in range(200)]
    whole = trace(LossScaler(initial_scale=2.0**100, window=4), overflows)
    for cut in (0, 1, 50, 133):
        first = LossScaler(initial_scale=2.0**100, window=4)
        scales = trace(first, overflows[:cut])
        second = LossScaler(window=4)
        second.load_state(first.state())
        assert scales + trace(second, overflows[cut:]) == whole
    fresh = LossScaler()
    fresh.load_state(None)
    assert fresh.scale == 65536
