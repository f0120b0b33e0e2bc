"""Cost of a model: published figures, and the sizes used by our own loader, cache and loop."""

import pytest
import torch

from easyllm.core.errors import ConfigError
from easyllm.engine import LLM
from easyllm.models.describe import describe, published_sizes
from easyllm.nn import Decoder
from easyllm.nn.config import GLUConfig, MoEConfig
from easyllm.plan import count_parameters, plan_model
from easyllm.plan.compute import training_flops
from easyllm.plan.inference import loaded_weight_bytes
from easyllm.plan.memory import estimate_training
from easyllm.plan.report import Rates
from easyllm.quant import weight_bytes

SIZES = ("gpt2", "llama2-7b", "mixtral-8x7b", "qwen1.5-0.5b", "smollm2-135m", "qwen3-0.6b")


def shared_experts():
    """Returns a mixture with a gated shared expert and widths that are not multiples of a block."""
    config = describe("smollm2-135m")
    expert = GLUConfig(intermediate_size=100)
    mixture = MoEConfig(
        num_experts=5, experts_per_token=2, expert=expert, shared=expert, shared_gate=True
    )
    layers = tuple(x.model_copy(update={"feed_forward": mixture}) for x in config.layers[:2])
    return config.changed(layers=layers)


CONFIGS = {name: describe(name) for name in SIZES} | {
    "shared experts": shared_experts(),
    "classifier": describe("smollm2-135m").changed(num_labels=3),
}


@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_planned_weights_have_the_size_reported_by_the_loader(config, scheme):
    with torch.device("meta"):
        model = Decoder(config)
    for dtype in (torch.float32, torch.bfloat16):
        expected = weight_bytes(model, dtype, scheme)
        assert loaded_weight_bytes(config, dtype.itemsize, scheme) == expected


def test_decoding_reads_only_active_experts_and_no_untied_embedding():
    mixtral = describe("mixtral-8x7b")
    table = 32000 * 4096
    active = count_parameters(mixtral).active
    assert loaded_weight_bytes(mixtral, 2, read=True) == 2 * (active - table)
    smol = describe("smollm2-135m")  # tied: the embedding is also the head
    assert loaded_weight_bytes(smol, 2, read=True) == 2 * count_parameters(smol).total
    whole, read = (loaded_weight_bytes(mixtral, 2, "int4", read=r) for r in (False, True))
    assert read < whole * 0.3


@pytest.mark.parametrize("cache_dtype", [None, "int8", "int4"])
def test_the_planned_cache_equals_the_engines_plan(tiny_folder, cache_dtype):
    llm = LLM(tiny_folder, cache_dtype=cache_dtype, dtype="bfloat16")
    plan = plan_model(
        llm.model.config, context=64, sequences=3, cache_itemsize=llm.engine.cache_itemsize
    )
    memory = llm.engine.memory
    assert plan.cache.total == 3 * 64 * memory.page_bytes // memory.page_size
    assert plan.loaded == memory.weight_bytes


PUBLISHED = {
    # parameters, active parameters, 16-bit cache bytes per token and for 4,096 tokens
    "llama2-7b": (6_738_415_616, 6_738_415_616, 524_288, 2_147_483_648),
    "llama2-70b": (68_976_648_192, 68_976_648_192, 327_680, 1_342_177_280),
    "mixtral-8x7b": (46_702_792_704, 12_879_925_248, 131_072, 536_870_912),
    "smollm2-135m": (134_515_008, 134_515_008, 23_040, 94_371_840),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures_are_reproduced_as_integers(name):
    values = plan_model(describe(name), context=4096).as_dict()
    keys = ("parameters_total", "parameters_active", "cache_bytes_per_token", "cache_bytes")
    assert tuple(values[key] for key in keys) == PUBLISHED[name]
    assert values["weight_bytes"] == 2 * PUBLISHED[name][0]
    numbers = [values["context"], *values["flops"].values(), *values["serving_bytes"].values()]
    numbers += [*values["parameters"].values(), *values["weight_bytes_by_format"].values()]
    assert all(type(number) is int for number in numbers)


def test_a_window_bounds_the_cache():
    """Mistral caches only the last 4,096 tokens of any text."""
    one, many = (plan_model(describe("mistral-7b"), context=n) for n in (4096, 32_768))
    assert one.cache.total == many.cache.total == 4096 * 131_072


def test_training_steps_equal_the_trainers_own_estimate():
    config = describe("smollm2-135m")
    full, lora = plan_model(config, context=512, train=True).training
    setup = {"micro_batch_tokens": 2048, "row_tokens": 512}
    assert full.memory == estimate_training(config, **setup)
    assert full.flops == training_flops(config, (512,) * 4)
    assert full.trained_parameters == 134_515_008
    assert lora.name == "lora_r16"
    assert lora.trained_parameters == 4_884_480
    assert lora.memory.total < full.memory.total
    assert not plan_model(config, context=512).training


def test_time_follows_the_machines_rates():
    plan = plan_model(describe("llama2-7b"), context=4096, train=True)
    rates = Rates(flops_per_s=1e14, read_bytes_per_s=1e12, free_bytes=10**12)
    assert plan.prefill_seconds(rates) == pytest.approx(plan.prefill_flops / 1e14)
    reading = 2 * (6_738_415_616 - 32000 * 4096) + 2_147_483_648
    assert plan.token_seconds(rates) == pytest.approx(reading / 1e12)
    slow = Rates(flops_per_s=1e9, read_bytes_per_s=1e12, free_bytes=10**12)
    assert plan.token_seconds(slow) == pytest.approx(plan.token_flops / 1e9)
    names = {"prefill", "decode_token", "training_step_full", "training_step_lora_r16"}
    assert plan.seconds(rates).keys() == names
    small = Rates(flops_per_s=1e14, read_bytes_per_s=1e12, free_bytes=10**9)
    assert plan.as_dict(small)["seconds"] == {}  # no time for what does not fit


def test_a_context_of_zero_is_refused():
    with pytest.raises(ConfigError, match="at least 1"):
        plan_model(describe("smollm2-135m"), context=0)


def test_every_published_size_is_described():
    for name in published_sizes():
        assert plan_model(describe(name), context=64).parameters.total > 0
