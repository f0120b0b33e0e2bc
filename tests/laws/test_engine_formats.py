"""The engine with other weight and cache formats, compiled steps, and streaming generation."""

import pytest
import torch

from easyllm.core.errors import ConfigError
from easyllm.engine import LLM, Engine, Request, SamplingParams
from easyllm.engine.options import EngineConfig
from easyllm.engine.rates import Shape, measure_rates
from easyllm.models import ContextConfig
from easyllm.models.context import extend_context
from easyllm.nn import Decoder
from tiny_models import build_tiny

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def prompts(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 320, (5 + 7 * i,), generator=generator).tolist() for i in range(count)]


def llm_of(tokenizer, model=None, **options):
    return LLM(model=model or build_tiny(seed=4), tokenizer=tokenizer, **options)


def logprobs(llm, several=4):
    return torch.tensor([done.logprobs for done in llm.generate(prompts(several), GREEDY)])


def test_the_compiled_step_generates_the_same_tokens_as_the_decoder(tiny_tokenizer):
    plain = llm_of(tiny_tokenizer, compiled_step=False)
    fast = llm_of(tiny_tokenizer)
    assert fast.engine.runner.fast_step is not None
    for a, b in zip(*(x.generate(prompts(6), GREEDY) for x in (plain, fast)), strict=True):
        assert a.token_ids == b.token_ids
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_an_unsupported_model_runs_through_the_decoder(tiny_tokenizer):
    llm = llm_of(tiny_tokenizer, build_tiny(seed=4).double())
    assert llm.engine.runner.fast_step is None
    assert len(llm.generate(prompts(2), GREEDY)) == 2


@pytest.mark.parametrize(("kept_as", "most"), [("bfloat16", 0.05), ("int8", 0.05), ("int4", 0.6)])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_quantized_cache_stays_close_to_the_full_precision_one(
    tiny_tokenizer, kept_as, most, compiled
):
    whole = llm_of(tiny_tokenizer)
    small = llm_of(tiny_tokenizer, cache_dtype=kept_as, compiled_step=compiled)
    bytes_of = [x.engine.memory.page_bytes for x in (whole, small)]
    assert bytes_of[1] < bytes_of[0] * {"bfloat16": 0.51, "int8": 0.32, "int4": 0.26}[kept_as]
    assert small.engine.runner.cache.num_bytes == small.engine.memory.cache_bytes
    text = prompts(1, seed=3)[0] * 8
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    scores = [
        torch.tensor([p.raw for p in x.generate([text], asked)[0].prompt_logprobs])
        for x in (whole, small)
    ]
    assert 0 < (scores[0] - scores[1]).abs().mean() < most


def test_quantized_pages_are_copied_completely(tiny_tokenizer):
    llm = llm_of(tiny_tokenizer, cache_dtype="int8")
    params = SamplingParams(temperature=1.0, max_tokens=12, n=3, seed=5, ignore_eos=True)
    (done,) = llm.generate(prompts(1), params)
    again = llm_of(tiny_tokenizer, cache_dtype="int8", prefix_caching=False)
    (same,) = again.generate(prompts(1), params)
    assert [x.token_ids for x in (done, *done.others)] == [
        x.token_ids for x in (same, *same.others)
    ]


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_weights_are_quantized_on_loading(tiny_folder, scheme):
    llm = LLM(tiny_folder, quantize=scheme)
    assert llm.model.packed_formats()
    assert llm.engine.memory.weight_bytes < 0.6 * LLM(tiny_folder).engine.memory.weight_bytes
    assert len(llm.generate(["hello"], GREEDY)[0].token_ids) == 24


def test_an_unknown_format_is_refused(tiny_tokenizer, tiny_folder):
    with pytest.raises(ConfigError, match="int8, int4"):
        llm_of(tiny_tokenizer, cache_dtype="int3")
    with pytest.raises(ConfigError, match="int8 or int4"):
        LLM(tiny_folder, quantize="int3")


@pytest.mark.parametrize("num_sinks", [0, 3])
def test_streaming_generation_continues_in_a_few_pages(tiny_tokenizer, num_sinks):
    plain = build_tiny(seed=4)
    context = ContextConfig(method="streaming", window=20, sinks=num_sinks)
    model = Decoder(extend_context(plain.config, context)).double()
    model.load_state_dict(plain.state_dict())
    model = model.eval().requires_grad_(False)
    options = EngineConfig(num_pages=8, page_size=8, max_step_tokens=16, max_running=4)
    engine = Engine(model, tiny_tokenizer, options)
    params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    prompt = tuple(prompts(1)[0])
    events = list(engine.run([Request(prompt_ids=prompt, params=params)]))
    ids = [*prompt, *(event.token_id for event in events)]
    assert len(ids) == len(prompt) + 400
    assert len(ids) > plain.config.max_seq_len
    assert engine.pool.available == 8
    whole = model.logits(ids).log_softmax(-1)
    rows = torch.arange(len(prompt) - 1, len(ids) - 1)
    expected = whole[rows, torch.tensor(ids[len(prompt) :])]
    got = torch.tensor([event.logprob for event in events], dtype=torch.float64)
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=0)


def test_rates_are_reported_with_the_machines_limits(tiny_tokenizer):
    shape = Shape(sequences=2, prompt=12, new=4)
    (rates,), machine = measure_rates(llm_of(tiny_tokenizer), (shape,), repeats=1)
    assert rates.decode_tokens_per_s > 0
    assert rates.prefill_tokens_per_s == pytest.approx(2 * 12 / rates.first_token_s)
    assert 0 < rates.read_share < 1
    assert machine["read_bytes_per_s"] > 1e8
