"""Memory is planned before anything is allocated, and a single sentence says if it does not fit."""

from functools import partial

import pytest
import torch

from easyllm.core.errors import ConfigError
from easyllm.engine import LLM, Engine, EngineConfig, SamplingParams
from easyllm.engine import engine as engine_module
from easyllm.engine import loading as loading_module
from easyllm.engine.kv_cache import KVCache
from easyllm.engine.memory_plan import check_weights_fit, plan_memory
from easyllm.models import ContextConfig
from easyllm.models.families import family_of
from easyllm.models.families.llama import SIZES
from easyllm.models.load import OpenSource
from easyllm.nn.config import LinearAttentionConfig
from easyllm.nn.decoder import Decoder
from easyllm.quant import schemes, weight_bytes
from tiny_models import build_tiny

SMOLLM2 = family_of("llama").read_config(SIZES["smollm2-135m"])
WEIGHTS = 538_060_032  # fp32


def plan(free_gb, config=SMOLLM2, **options):
    return plan_memory(
        config,
        EngineConfig(**options),
        weight_bytes=WEIGHTS,
        itemsize=4,
        free_bytes=int(free_gb * 1e9),
    )


def test_by_default_the_cache_takes_at_most_a_quarter_of_free_memory_and_no_more_than_it_can_use():
    laptop, server = plan(6), plan(500)
    assert laptop.page_bytes == 16 * 46_080
    assert 0.249 * 6e9 < laptop.cache_bytes <= 0.25 * 6e9
    assert server.num_tokens == 64 * SMOLLM2.max_seq_len
    assert plan(500, max_running=2).num_tokens == 2 * SMOLLM2.max_seq_len


def test_a_requested_size_is_used():
    assert plan(6, num_pages=100).num_tokens == 1600
    assert plan(6, num_pages=100, page_size=4).num_tokens == 400
    assert 0.999e9 < plan(6, cache_gb=1.0).cache_bytes <= 1e9


def test_the_plan_equals_the_allocation():
    made = plan(6, num_pages=50)
    cache = KVCache(SMOLLM2, made.num_pages, 16, torch.float32, torch.device("meta"))
    assert cache.num_bytes == made.cache_bytes


def test_a_model_with_only_recurrent_states_counts_tokens_and_takes_little():
    config = build_tiny().config
    linear = LinearAttentionConfig(num_heads=2, head_dim=16)
    layers = tuple(x.model_copy(update={"mixer": linear}) for x in config.layers)
    made = plan(1, config.changed(layers=layers))
    assert made.page_bytes == 0
    assert made.num_tokens == 64 * 256
    assert made.cache_bytes == 64 * 2 * 2 * (16 * 16 + 16) * 4


def test_the_line_says_how_the_cache_was_sized_and_that_it_is_not_filled_yet():
    made = plan(6, cache_gb=1.0)
    assert made.line() == (
        "memory: weights 0.54 GB, KV cache up to 1.00 GB (21,696 tokens: cache_gb=1), "
        f"taken as it fills; at most {made.predicted_peak_bytes / 1e9:.2f} GB in all; 6.0 GB free"
    )
    assert 1.54e9 < made.predicted_peak_bytes < 1.6e9  # and the activations of a prompt
    assert "0.38 GB (8,192 tokens: 1 sequence of 8,192), taken" in plan(6, max_running=1).line()
    assert "25% of free memory; 64 sequences of 8,192 would need 24.2 GB)" in plan(6).line()
    options = {"weight_bytes": WEIGHTS, "itemsize": 4, "free_bytes": 6 * 10**9}
    gpu = plan_memory(SMOLLM2, EngineConfig(num_pages=16), on_demand=False, **options)
    assert "KV cache 0.01 GB (256 tokens: num_pages=16), reserved; " in gpu.line()


def test_the_error_for_a_too_large_cache_says_how_much_is_missing_and_what_helps():
    with pytest.raises(
        ConfigError, match=r"needs 8.00 GB, but only 6.00 GB are free.*2.00 GB short.*cache_gb"
    ):
        plan(6, cache_gb=8.0)
    with pytest.raises(
        ConfigError, match=r"less than one page of 16 tokens \(0.0007 GB\); raise it"
    ):
        plan(6, cache_gb=0.0001)
    with pytest.raises(ConfigError, match="GB short"):
        plan(0.0001)


def test_the_error_for_too_large_weights_says_how_much_is_missing_and_what_helps():
    with torch.device("meta"):
        model = Decoder(SMOLLM2)

    def check(free_bytes, quantize=None):
        check_weights_fit(
            partial(weight_bytes, model),
            torch.float32,
            free_bytes,
            quantize=quantize,
            schemes=schemes(),
        )

    check(WEIGHTS)
    with pytest.raises(
        ConfigError, match=r"0.54 GB as float32, .*.0.14 GB short.; set dtype to bf"
    ):
        check(400_000_000)
    with pytest.raises(ConfigError, match=r"short.; set quantize to int8"):
        check(150_000_000)
    with pytest.raises(ConfigError, match=r"0.14 GB as int8, .*short.; set quantize to int4"):
        check(100_000_000, quantize="int8")
    with pytest.raises(ConfigError, match=r"short.; use a smaller model"):
        check(80_000_000)


def test_an_llm_that_does_not_fit_is_refused_before_anything_is_loaded(tiny_folder, monkeypatch):
    with pytest.raises(ConfigError, match="did you mean 'num_pages'"):
        LLM(tiny_folder, num_page=3)
    monkeypatch.setattr(loading_module, "memory_free_bytes", lambda device: 1000)
    monkeypatch.setattr(OpenSource, "model", lambda *a, **k: pytest.fail("was loaded"))
    with pytest.raises(ConfigError, match="GB short"):
        LLM(tiny_folder)


def test_nothing_is_allocated_before_the_first_request(tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(engine_module, "KVCache", lambda *a: pytest.fail("was allocated"))
    Engine(tiny_model, tiny_tokenizer, EngineConfig(num_pages=10))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keys_may_be_cached_in_another_dtype(tiny_tokenizer, dtype):
    model = build_tiny(seed=3).double()
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, prompt_logprobs=0)
    exact = LLM(model=model, tokenizer=tiny_tokenizer)
    rounded = LLM(model=model, tokenizer=tiny_tokenizer, cache_dtype=dtype)
    (a,), (b,) = (llm.generate([list(range(3, 60))], params) for llm in (exact, rounded))
    size = getattr(torch, dtype).itemsize
    assert rounded.engine.memory.page_bytes * 8 == exact.engine.memory.page_bytes * size
    worst = max(
        abs(x.raw - y.raw) for x, y in zip(a.prompt_logprobs, b.prompt_logprobs, strict=True)
    )
    assert 0 < worst < {"float32": 1e-4, "bfloat16": 1.0}[dtype]


GIVEN = {
    "dtype": "bfloat16",
    "device": "cpu",
    "context": ContextConfig(method="yarn"),
    "quantize": "int4",
}


@pytest.mark.parametrize("name", GIVEN)
def test_loading_options_are_refused_for_a_given_model(tiny_tokenizer, name):
    """The caller may use the model elsewhere: quantizing it would change it there as well."""
    model = build_tiny()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=f"{name} would change the model that was passed in"):
        LLM(model=model, tokenizer=tiny_tokenizer, **{name: GIVEN[name]})
    assert not model.packed_formats()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with pytest.raises(
        ConfigError, match=r'quantize_weights\(model, "int8"\), which changes it in place'
    ):
        LLM(model=model, tokenizer=tiny_tokenizer, quantize="int8")
