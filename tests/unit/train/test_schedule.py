"""Learning rate schedules: their values, and equality with `transformers` at every step."""

import math

import pytest
import torch
from transformers import optimization

from easyllm.train.optim_config import (
    ConstantConfig,
    CosineConfig,
    InverseSqrtConfig,
    LinearConfig,
    WarmupStableDecayConfig,
)
from easyllm.train.schedule import rate_factor, warmup_steps

EXACT = {"rel": 0, "abs": 1e-12}
LENGTHS = [(1, 0), (2, 1), (7, 0), (10, 3), (100, 10), (257, 31), (20, 20), (10, 25)]
"""Total steps and warm-up steps; in the last two, the warm-up never ends."""


def theirs(make, total, **options):
    """Returns the factors of a `transformers` schedule at each step of a run."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    factor = make(optimizer, **options).lr_lambdas[0]
    return [factor(step) for step in range(total)]


def ours(schedule, total):
    return [rate_factor(schedule, step, total) for step in range(total)]


@pytest.mark.parametrize(("total", "warmup"), LENGTHS)
def test_constant_linear_cosine_and_inverse_sqrt_equal_transformers_at_every_step(total, warmup):
    hf = optimization
    for config, make, options in (
        (ConstantConfig, hf.get_constant_schedule_with_warmup, {}),
        (LinearConfig, hf.get_linear_schedule_with_warmup, {"num_training_steps": total}),
        (CosineConfig, hf.get_cosine_schedule_with_warmup, {"num_training_steps": total}),
        (InverseSqrtConfig, hf.get_inverse_sqrt_schedule, {}),
    ):
        expected = theirs(make, total, num_warmup_steps=warmup, **options)
        found = ours(config(warmup_steps=warmup), total)
        assert found == pytest.approx(expected, **EXACT), config.__name__


@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize(("total", "warmup"), [(10, 3), (100, 10), (257, 0)])
def test_decays_with_a_floor_equal_transformers(total, warmup, floor):
    expected = theirs(
        optimization.get_cosine_with_min_lr_schedule_with_warmup,
        total,
        num_warmup_steps=warmup,
        num_training_steps=total,
        min_lr_rate=floor,
    )
    cosine = CosineConfig(warmup_steps=warmup, floor=floor)
    assert ours(cosine, total) == pytest.approx(expected, **EXACT)
    expected = theirs(
        optimization.get_polynomial_decay_schedule_with_warmup,
        total,
        num_warmup_steps=warmup,
        num_training_steps=total,
        lr_end=floor,
    )
    linear = LinearConfig(warmup_steps=warmup, floor=floor)
    assert ours(linear, total) == pytest.approx(expected, **EXACT)


@pytest.mark.parametrize("shape", ["linear", "cosine", "sqrt"])
@pytest.mark.parametrize(("total", "warmup", "ratio"), [(100, 10, 0.2), (57, 5, 0.1), (30, 0, 1.0)])
def test_warmup_stable_decay_equals_transformers(total, warmup, ratio, shape):
    for floor in (0.0, 0.25):
        expected = theirs(
            optimization.get_wsd_schedule,
            total,
            num_warmup_steps=warmup,
            num_training_steps=total,
            num_decay_steps=math.ceil(ratio * total),
            decay_type="1-sqrt" if shape == "sqrt" else shape,
            min_lr_ratio=floor,
        )
        schedule = WarmupStableDecayConfig(
            warmup_steps=warmup, decay_ratio=ratio, shape=shape, floor=floor
        )
        found = ours(schedule, total)
        assert found[warmup:] == pytest.approx(expected[warmup:], **EXACT)
        if floor == 0:  # transformers' warm-up starts at the floor, ours at 0
            assert found == pytest.approx(expected, **EXACT)


def test_the_stable_phase_is_at_the_peak_and_the_decay_at_the_end():
    schedule = WarmupStableDecayConfig(warmup_steps=2, decay_ratio=0.4, floor=0.2)
    assert [rate_factor(schedule, step, 10) for step in range(11)] == pytest.approx(
        [0, 0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    )


def test_a_decay_longer_than_the_steps_after_warm_up_starts_after_it():
    schedule = WarmupStableDecayConfig(warmup_steps=6, decay_ratio=0.8)
    assert [rate_factor(schedule, step, 10) for step in (5, 6, 8, 10)] == pytest.approx(
        [5 / 6, 1, 0.5, 0]
    )


def test_a_ratio_is_rounded_up_to_steps_and_explicit_steps_take_precedence():
    assert warmup_steps(CosineConfig(warmup_ratio=0.03), 101) == 4
    assert warmup_steps(CosineConfig(warmup_ratio=0.03), 100) == 3
    assert warmup_steps(CosineConfig(warmup_ratio=0.5, warmup_steps=7), 100) == 7
    assert warmup_steps(CosineConfig(warmup_ratio=0.5, warmup_steps=0), 100) == 0


@pytest.mark.parametrize("config", [ConstantConfig, LinearConfig, CosineConfig, InverseSqrtConfig])
def test_a_run_of_one_step_trains_at_its_peak_rate(config):
    assert rate_factor(config(warmup_ratio=0.03), 0, 1) == 1.0


@pytest.mark.parametrize(
    "schedule",
    [
        LinearConfig(warmup_steps=4, floor=0.1),
        CosineConfig(warmup_steps=4, floor=0.1),
        WarmupStableDecayConfig(warmup_steps=4, floor=0.1, decay_ratio=0.5, shape="sqrt"),
    ],
)
def test_a_factor_rises_to_1_then_never_rises_and_ends_at_the_floor(schedule):
    factors = [rate_factor(schedule, step, 40) for step in range(60)]
    assert factors[4] == max(factors) == 1.0
    assert factors[:5] == sorted(factors[:5])
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert factors[40:] == pytest.approx([0.1] * 20)
