"""The time of rollouts in a plan, from the rates of a machine."""

import pytest

from easyllm.models.families.llama import SIZES, read_config
from easyllm.plan.compute import decode_flops, forward_flops
from easyllm.plan.inference import loaded_weight_bytes
from easyllm.plan.kv_cache import cache_size
from easyllm.rl.duration import rollout_seconds
from easyllm.rl.loader import RolloutLoader
from easyllm.rl.prompts import PromptSample
from easyllm.rl.rollout import RolloutConfig
from easyllm.train.objectives import Speed, StepSizes

MODEL = read_config(SIZES["llama2-7b"])
PROMPTS = [PromptSample((1,) * length, (-100,) * length) for length in (30, 50)]


def seconds(flops_per_s, read_bytes_per_s, *, passes=0, **changes):
    config = RolloutConfig(group_size=4, max_tokens=24, max_running=8, **changes)
    speed = Speed(itemsize=2, flops_per_s=flops_per_s, read_bytes_per_s=read_bytes_per_s)
    sizes = StepSizes(batch_size=4, batch_tokens=None, micro_batch_tokens=512, seed=0)
    loader = RolloutLoader(PROMPTS, sizes, config, collector=None)
    return rollout_seconds(loader, MODEL, passes=passes, speed=speed)


def test_decoding_is_bound_by_reading_weights_and_cache():
    """Two prompts of 40 tokens on average: 8 answers of 24 tokens, all at once."""
    cache = cache_size(MODEL, context=64, sequences=8, itemsize=2).total
    read = loaded_weight_bytes(MODEL, 2, None, read=True) + cache
    assert seconds(1e30, 1e9) == pytest.approx(24 * read / 1e9)


def test_decoding_is_bound_by_arithmetic():
    prefill = 2 * forward_flops(MODEL, [40], head_rows=1).total
    decode = 24 * 8 * decode_flops(MODEL, 64).total
    assert seconds(1e9, 1e30) == pytest.approx((prefill + decode) / 1e9)


def test_passes_before_the_updates_are_counted():
    one = 8 * forward_flops(MODEL, [64], head_rows=24).total / 1e9
    assert seconds(1e9, 1e30, passes=2) - seconds(1e9, 1e30) == pytest.approx(2 * one)


def test_a_quantized_copy_is_read_faster():
    assert seconds(1e30, 1e9, quantize="int4") < 0.5 * seconds(1e30, 1e9)
