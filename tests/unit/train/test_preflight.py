"""The plan of a run: the warning about too few steps, and the work of shared prompts."""

import re
from dataclasses import replace

import pytest
import torch

from easyllm.batches.loader import Loader
from easyllm.examples.sample import Sample
from easyllm.plan.process import LOADED_LATER
from easyllm.train.config import TrainConfig
from easyllm.train.objectives import DPO
from easyllm.train.preflight import ENOUGH_STEPS, few_steps, plan_run
from easyllm.train.run import count_steps
from easyllm.train.training_data import TrainingData
from preference_rows import random_group
from tiny_models import build_tiny


def configured(**changes):
    return TrainConfig.model_validate({"data": {"train": ["-"]}, **changes})


def data_of(config, num_rows):
    """Returns training data of `num_rows` samples with 5 to 11 tokens each."""
    samples = [Sample.from_mask(tuple(range(3, 8 + row % 7))) for row in range(num_rows)]
    loader = Loader(
        samples,
        batch_size=config.batch_size,
        batch_tokens=config.batch_tokens,
        micro_batch_tokens=64,
        seed=0,
    )
    tokens = sum(sample.num_tokens for sample in samples)
    return TrainingData(loader, None, tokens, "", [], {"samples": num_rows}, {})


def warned(num_rows, **changes):
    config = configured(**changes)
    data = data_of(config, num_rows)
    return few_steps(config, data, count_steps(config, data))


def test_a_small_file_is_reported_with_settings_that_are_enough():
    assert warned(30, batch_size=16, epochs=2) == [
        "only 4 steps: too few to learn much from; raise epochs (epochs=25) or lower batch_size "
        "(batch_size=1)"
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 16, "epochs": 2},
        {"batch_size": 8, "epochs": 4},
        {"batch_size": None, "batch_tokens": 200, "epochs": 3},
    ],
)
@pytest.mark.parametrize("num_rows", [17, 24, 30])
def test_each_advised_setting_alone_gives_enough_steps(num_rows, changes):
    (warning,) = warned(num_rows, **changes)
    advised = re.findall(r"\((\w+)=(\d+)\)", warning)
    assert advised[0][0] == "epochs"
    for key, value in advised:
        config = configured(**{**changes, key: int(value)})
        assert count_steps(config, data_of(config, num_rows)) >= ENOUGH_STEPS


def test_a_batch_that_cannot_be_small_enough_is_not_advised():
    assert warned(3, batch_size=16) == [
        "only 1 step: too few to learn much from; raise epochs (epochs=50)"
    ]


def test_a_bound_on_tokens_is_named_as_the_reason():
    (warning,) = warned(400, batch_size=4, max_tokens=200)
    assert re.search(r"raise max_tokens \(max_tokens=\d+\)$", warning)
    enough = int(warning.split("=")[1].rstrip(")"))
    config = configured(batch_size=4, max_tokens=enough)
    assert count_steps(config, data_of(config, 400)) >= ENOUGH_STEPS


@pytest.mark.parametrize(
    ("num_rows", "changes"), [(20, {"batch_size": 1}), (400, {"max_steps": 2})]
)
def test_enough_steps_and_a_bound_on_steps_cause_no_warning(num_rows, changes):
    assert warned(num_rows, **changes) == []


@pytest.mark.parametrize("adapter", [None, {"kind": "prompt", "num_virtual_tokens": 4}])
def test_a_shared_prompt_is_planned_once_where_it_is_computed_once(adapter):
    groups = [random_group(20, 5, 7, seed=i) for i in range(4)]
    shared = DPO().num_shared_tokens(groups)
    assert shared == 4 * 20
    config = configured(adapter=adapter, batch_size=2, epochs=3, micro_batch_tokens=64)
    tokens = sum(part.num_tokens for group in groups for part in group.parts)
    loader = Loader(groups, batch_size=2, micro_batch_tokens=256, seed=0)
    data = TrainingData(loader, None, tokens, "", [], {"samples": 4}, {})
    plans = [
        plan_run(config, build_tiny().config, DPO(), each, 6, torch.device("cpu"))
        for each in (data, replace(data, shared_per_epoch=shared))
    ]
    expected = 1.0 if adapter else (tokens - shared) / tokens
    assert plans[1].flops / plans[0].flops == pytest.approx(expected)
    assert plans[1].tokens == plans[0].tokens == 3 * tokens


def test_reading_the_weights_is_the_peak_of_a_small_step():
    groups = [random_group(20, 5, 7, seed=i) for i in range(4)]
    config = configured(batch_size=2, micro_batch_tokens=64)
    loader = Loader(groups, batch_size=2, micro_batch_tokens=256, seed=0)
    data = TrainingData(loader, None, 100, "", [], {"samples": 4}, {})
    arguments = (config, build_tiny().config, DPO(), data, 6, torch.device("cpu"), 1e12)
    small, large = plan_run(*arguments), plan_run(*arguments, 10**9)
    assert small.load_bytes == 0
    assert small.peak == small.memory.peak
    assert large.peak == large.predictions()["predicted_bytes"]["peak"] == "load"
    loading = large.process_bytes - LOADED_LATER + large.load_bytes
    assert large.predicted_peak_bytes == loading
    assert large.load_bytes > 10**9
