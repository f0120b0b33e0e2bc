"""Training split over devices: bytes against the closed forms, what fits, what is impossible."""

import re

import pytest

from easyllm.core.errors import ConfigError
from easyllm.models.describe import describe
from easyllm.plan.hardware import find_hardware
from easyllm.plan.parallel import Split, costs_of, impossible, limits_of, split_memory, traffic
from easyllm.plan.parameters import count_parameters
from easyllm.plan.published import state_bytes
from easyllm.plan.search import Wish, find_ways

LLAMA = describe("llama2-7b")
TOTAL = count_parameters(LLAMA).total


def states(split):
    found = split_memory(costs_of(LLAMA, 2048), split)
    return found.weights + found.gradients + found.optimizer


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_states_of_data_parallelism_equal_the_zero_table(stage):
    assert states(Split(data=8, stage=stage)) == pytest.approx(state_bytes(TOTAL, stage, 8), abs=8)


def test_tensor_and_pipeline_parallelism_divide_the_matrices():
    whole = states(Split())
    norms = 16 * 65 * 4096  # norms are on every tensor parallel rank
    assert states(Split(tensor=4)) == pytest.approx((whole - norms) / 4 + norms, rel=1e-5)
    half = states(Split(pipeline=2))
    table = 16 * 32000 * 4096
    assert half == pytest.approx((whole - 2 * table) / 2 + table, rel=1e-4)


def test_activations_shrink_as_the_policies_say():
    costs = costs_of(LLAMA, 2048)

    def kept(**changes):
        return split_memory(costs, Split(tensor=4, **changes)).activations

    assert kept() < kept(sequence_parallel=False)
    assert kept() == pytest.approx(split_memory(costs, Split()).activations / 4, rel=1e-6)
    assert kept(recompute="full") < kept(recompute="selective") < kept()
    assert kept(micro_batch=2) == 2 * kept()
    interleaved = split_memory(costs, Split(pipeline=4, interleave=2)).activations
    assert interleaved == pytest.approx(split_memory(costs, Split(pipeline=4)).activations * 11 / 8)


def test_offloaded_states_are_on_the_host():
    costs = costs_of(LLAMA, 2048)
    found = split_memory(costs, Split(data=8, stage=2, offload="optimizer"))
    assert found.optimizer == 0
    assert found.host == 12 * TOTAL // 8


def test_traffic_of_data_and_tensor_parallelism():
    costs = costs_of(LLAMA, 2048)
    plain = traffic(costs, Split(data=8), 1)
    assert plain.data == pytest.approx(2 * TOTAL * 2 * 7 / 8)
    sharded = traffic(costs, Split(data=8, stage=3), 1)
    assert sharded.data == pytest.approx(1.5 * plain.data)
    hidden = 2048 * 4096 * 2
    assert traffic(costs, Split(tensor=4), 1).tensor == pytest.approx(32 * 4 * 2 * 3 / 4 * hidden)
    assert traffic(costs, Split(pipeline=2), 4).pipeline == 8 * hidden


def test_the_fastest_fitting_way_is_first_and_the_rest_say_why():
    found = find_ways(LLAMA, find_hardware("A100-80GB"), 8, context=2048)
    times = [float(f"{way.time.total:.4g}") for way in found.fitting]
    assert times == sorted(times)
    assert all(way.memory.total <= way.hardware.usable_bytes for way in found.fitting)
    assert found.failing[0].split.name == "DP8"  # 16 bytes times 6.7B are more than 80 GB
    assert all(way.memory.total > way.hardware.usable_bytes for way in found.failing)
    best = found.fitting[0]
    assert 0 < best.mfu <= best.hfu <= best.hardware.utilisation + 1e-9
    assert best.tokens_per_s == pytest.approx(best.tokens / best.time.total)


def test_recomputation_is_chosen_only_where_it_is_needed():
    free = find_ways(LLAMA, find_hardware("H200-141GB"), 8, context=2048).fitting[0]
    assert free.split.recompute == "none"
    tight = Wish(tensor=1, pipeline=1, stage=3, micro_batch=8, batch=128)
    forced = find_ways(LLAMA, find_hardware("A100-40GB"), 8, context=2048, wish=tight)
    assert forced.fitting[0].split.recompute != "none"
    assert forced.fitting[0].hfu > forced.fitting[0].mfu


IMPOSSIBLE = {
    "layers": (Split(pipeline=5), 8, "32 layers do not divide into 5 stages; .*1, 2, 4, 8, 16, 32"),
    "heads": (Split(tensor=3), 8, "32 attention heads are not divisible by tensor=3"),
    "batch": (Split(data=8, micro_batch=3), 16, "not divisible by data=8 times"),
    "stages with ZeRO-3": (Split(data=4, pipeline=2, stage=3), 16, "use ZeRO-1 with a pipeline"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_an_impossible_split_names_the_degrees_that_would_do(name):
    split, batch, message = IMPOSSIBLE[name]
    assert re.search(message, impossible(limits_of(LLAMA), split, batch))


def test_degrees_must_divide_the_devices():
    with pytest.raises(ConfigError, match="does not divide 8 GPUs"):
        find_ways(LLAMA, find_hardware("A100-80GB"), 8, context=512, wish=Wish(tensor=3))


def test_few_kv_heads_are_repeated_rather_than_refused():
    grouped = describe("llama2-70b")  # 8 KV heads
    assert impossible(limits_of(grouped), Split(tensor=16), 8) is None
