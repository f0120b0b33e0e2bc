"""LoRA adapters mixed in one batch, in the compiled step: each row equals its request alone.

In deterministic mode the equality is bitwise. Adapters are loaded and unloaded while others run.
"""

import copy

import pytest
import torch

from adapter_kinds import config_of
from easyllm.adapters import LoRAConfig, adapter_of, attach, detach, save_adapter
from easyllm.adapters.attach import place
from easyllm.core.errors import ConfigError
from easyllm.engine import LLM, Engine, Request, SamplingParams
from easyllm.engine.compiled_step import CompiledStep
from easyllm.engine.options import EngineConfig
from easyllm.engine.runner import logits_in_passes
from easyllm.models import hf_module_name
from easyllm.nn.context import AdapterRows, ForwardContext
from easyllm.ops.kernels.build import _library
from easyllm.quant import quantize_weights
from engine_requests import prompts_of
from tiny_models import build_tiny

pytestmark = pytest.mark.skipif(_library() is None, reason="there is no C compiler")

WIDE = {"hidden_size": 96, "intermediate_size": 224, "num_attention_heads": 6}
BIASES = {"attention_bias": True, "mlp_bias": True}
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIGS = {
    "plain": LoRAConfig(rank=8, alpha=16),
    "wide": LoRAConfig(rank=16, alpha=8),
    "odd": LoRAConfig(rank=3, alpha=7),
    "one": LoRAConfig(rank=1, alpha=2),
    "rank-stabilised": LoRAConfig(rank=12, alpha=9, rslora=True),
    "queries only": LoRAConfig(rank=4, alpha=8, targets=("q_proj",)),
    "feed-forward": LoRAConfig(rank=5, alpha=8, targets=("gate_proj", "down_proj")),
    "by layer": LoRAConfig(rank=6, alpha=9, rank_pattern={"layers.0.mixer.q_proj": 11}),
}
"""Eight adapters: different ranks, scales and targets."""
BASES = [None, "int8", "int4"]
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


def give_values(adapters, seed):
    """Gives an adapter random values, as if it were trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.own_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def base_of(scheme=None, *, dtype=torch.float32, **changes):
    model = build_tiny(seed=6, **WIDE | BIASES | changes).to(dtype)
    return quantize_weights(model, scheme) if scheme else model


def with_adapters(model, configs=CONFIGS):
    for seed, (name, config) in enumerate(configs.items()):
        give_values(place(model, config, name=name), seed)
    return model.eval().requires_grad_(False)


def requests_of(names, params=GREEDY):
    prompts = prompts_of([3 + 11 * i for i in range(len(names))], seed=1)
    return [
        Request(prompt_ids=prompt, params=params, adapter=name)
        for prompt, name in zip(prompts, names, strict=True)
    ]


def outcome(engine, requests):
    """Returns tokens and log-probabilities of each request, in order."""
    found = {request.id: [] for request in requests}
    for event in engine.run(requests):
        found[event.request_id].append((event.token_id, event.logprob))
    return [found[request.id] for request in requests]


def engine_of(model, tokenizer, **options):
    values = {"page_size": 8, "num_pages": 300, "deterministic": True}
    return Engine(model, tokenizer, EngineConfig(**values | options))


NAMES = ["", *CONFIGS, "plain", "odd", ""]


@pytest.mark.parametrize("scheme", BASES)
def test_eight_adapters_in_one_batch_are_bitwise_identical_to_each_alone(tiny_tokenizer, scheme):
    model = with_adapters(base_of(scheme))
    engine = engine_of(model, tiny_tokenizer, prefix_caching=False)
    assert isinstance(engine.runner.fast_step, CompiledStep)
    assert engine.runner.fast_step.supports_adapters(CONFIGS)
    together = outcome(engine, requests_of(NAMES))
    for request, got in zip(requests_of(NAMES), together, strict=True):
        alone = engine_of(model, tiny_tokenizer, prefix_caching=False)
        assert outcome(alone, [request]) == [got]
    assert len({tuple(each) for each in together}) == len(together)


@pytest.mark.parametrize("scheme", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_step_gives_the_bits_of_the_decoder(tiny_tokenizer, scheme, dtype):
    model = with_adapters(base_of(scheme, dtype=dtype))
    done = [
        outcome(engine_of(model, tiny_tokenizer, compiled_step=on), requests_of(NAMES))
        for on in (True, False)
    ]
    assert done[0] == done[1]


@pytest.mark.parametrize("scheme", BASES)
def test_an_adapter_by_name_is_bitwise_the_same_adapter_alone(tiny_tokenizer, scheme):
    """Alone, it is attached without a name; the base is the model without an adapter."""
    model = with_adapters(base_of(scheme))
    together = outcome(engine_of(model, tiny_tokenizer), requests_of(NAMES))
    for seed, (name, config) in enumerate({"": None, **CONFIGS}.items()):
        twin = base_of(scheme)
        if config is not None:
            give_values(place(twin, config), seed - 1)
        engine = engine_of(twin.eval().requires_grad_(False), tiny_tokenizer)
        assert isinstance(engine.runner.fast_step, CompiledStep)
        for request, got in zip(requests_of(NAMES), together, strict=True):
            if request.adapter == name:
                plain = Request(prompt_ids=request.prompt_ids, params=GREEDY)
                assert outcome(engine, [plain]) == [got]


def test_log_probabilities_bitwise_equal_the_forward_pass_with_the_adapter(tiny_tokenizer):
    llm = LLM(model=with_adapters(base_of()), tokenizer=tiny_tokenizer, deterministic=True)
    prompts = [list(request.prompt_ids) for request in requests_of(NAMES)]
    done = llm.generate(prompts, GREEDY, adapter=NAMES)
    for prompt, each, name in zip(prompts, done, NAMES, strict=True):
        scores = llm.score([*prompt, *each.token_ids], adapter=name)
        assert scores[len(prompt) - 1 :] == each.logprobs


@pytest.mark.parametrize("scheme", BASES)
def test_without_the_mode_they_agree_within_rounding(tiny_tokenizer, scheme):
    model = with_adapters(base_of(scheme, num_hidden_layers=1))
    engines = [
        engine_of(
            model, tiny_tokenizer, deterministic=False, compiled_step=on, cache_dtype="float32"
        )
        for on in (True, False)
    ]
    one = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    fast, plain = (outcome(engine, requests_of(NAMES, one)) for engine in engines)
    for a, b in zip(fast, plain, strict=True):
        assert [t for t, _ in a] == [t for t, _ in b]
        assert [p for _, p in a] == pytest.approx([p for _, p in b], abs=0.02 if scheme else 1e-4)


def test_a_head_of_its_own_may_have_an_adapter(tiny_tokenizer):
    config = LoRAConfig(rank=4, alpha=8, targets=(*ALL, "lm_head"))
    configs = {"head": config, "odd": CONFIGS["odd"]}
    model = with_adapters(base_of(tie_word_embeddings=False), configs)
    names = ["head", "", "odd", "head"]
    done = [
        outcome(engine_of(model, tiny_tokenizer, compiled_step=on), requests_of(names))
        for on in (True, False)
    ]
    assert done[0] == done[1]


@pytest.mark.parametrize("kind", ["dora", "ia3"])
def test_adapters_of_another_form_run_through_the_decoder(tiny_tokenizer, kind):
    configs = {"odd": CONFIGS["odd"], "other": config_of(kind)}
    model = with_adapters(base_of(), configs)
    engine = engine_of(model, tiny_tokenizer, deterministic=False, cache_dtype="float32")
    step = engine.runner.fast_step
    assert step.supports_adapters({"odd", ""})
    assert not step.supports_adapters({"odd", "other"})
    names = ["other", "odd", "", "other"]
    mixed = outcome(engine, requests_of(names))
    for request, got in zip(requests_of(names), mixed, strict=True):
        (alone,) = outcome(engine, [request])
        assert [t for t, _ in alone] == [t for t, _ in got]


def test_pruned_ranks_and_untouched_layers_leave_the_base(tiny_tokenizer):
    """AdaLoRA may prune all triplets of a layer."""
    config = config_of("adalora")
    model = base_of()
    adapters = place(model, config, name="ada")
    give_values(adapters, 0)
    with torch.no_grad():
        for number, (_, adapter) in enumerate(adapters.linears.values()):
            kept = slice(0, number % 3)
            adapter.lora_A = torch.nn.Parameter(adapter.lora_A[kept])
            adapter.lora_E = torch.nn.Parameter(adapter.lora_E[kept])
            adapter.lora_B = torch.nn.Parameter(adapter.lora_B[:, kept])
            adapter.keeps = adapter.keeps[kept]
    model.eval().requires_grad_(False)
    done = [
        outcome(
            engine_of(model, tiny_tokenizer, compiled_step=on, deterministic=False),
            requests_of(["ada", ""]),
        )
        for on in (True, False)
    ]
    for a, b in zip(*done, strict=True):
        assert [t for t, _ in a] == [t for t, _ in b]


def test_named_adapters_in_one_batch_have_the_gradients_of_each_alone():
    # in fp64: gradients reach thousands, of which fp32 rounds off more than the bound
    configs = {name: CONFIGS[name] for name in ("odd", "wide")}
    model = with_adapters(base_of(dtype=torch.float64), configs).to(torch.float64)
    for name in configs:
        for parameter in adapter_of(model, name).own_parameters():
            parameter.requires_grad_(True)
    ids = [torch.tensor(prompt) for prompt in prompts_of([9, 5, 7])]
    names = ["odd", "", "wide"]

    def gradients(chosen):
        lengths = [len(ids[i]) for i in chosen]
        rows = AdapterRows.of_sequences([names[i] for i in chosen], lengths)
        context = ForwardContext.packed(lengths, adapters=rows)
        model.zero_grad()
        hidden = model(torch.cat([ids[i] for i in chosen]), context)
        model.head(hidden, context).square().sum().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {name: grad.clone() for name, grad in found.items()}

    together = gradients([0, 1, 2])
    for name, grad in {**gradients([0]), **gradients([2])}.items():
        torch.testing.assert_close(together[name], grad, atol=1e-8, rtol=1e-8)
    assert len(together) == 2 * sum(len(adapter_of(model, n).own_parameters()) for n in ("odd",))


# ---- loading and unloading while requests run


@pytest.fixture
def folders(tmp_path):
    """The folders of three adapters."""
    found = {}
    for seed, name in enumerate(("first", "second", "third")):
        model = base_of()
        give_values(attach(model, LoRAConfig(rank=2 + seed, alpha=8)), seed)
        found[name] = tmp_path / name
        save_adapter(model, found[name], module_name=hf_module_name(model), base="tiny")
    return found


def long_requests(names):
    return requests_of(names, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))


@pytest.mark.parametrize("deterministic", [False, True])
def test_loading_and_unloading_disturb_no_other_request(tiny_tokenizer, folders, deterministic):
    first, second, third = folders.values()
    llm = LLM(
        model=base_of(),
        tokenizer=tiny_tokenizer,
        adapters={"first": first, "second": second},
        deterministic=deterministic,
    )
    engine = llm.engine
    requests = long_requests(["", "first", "second"])
    for request in requests:
        engine.add(request)
    events = [event for _ in range(5) for event in engine.step()]
    llm.load_adapter("third", third)
    late = long_requests(["third"])[0]
    engine.add(late)
    events += [event for _ in range(5) for event in engine.step()]
    llm.unload_adapter("second")
    while engine.busy:
        events += engine.step()
    assert engine.scheduler.num_preemptions == 0
    ends = {e.request_id: e.finish_reason for e in events if e.finish_reason}
    assert ends == {
        requests[0].id: "length",
        requests[1].id: "length",
        requests[2].id: "cancelled",
        late.id: "length",
    }
    llm.load_adapter("second", second)
    for request in (*requests[:2], late, requests[2]):
        expected = llm.generate([list(request.prompt_ids)], request.params, adapter=request.adapter)
        got = [e.token_id for e in events if e.request_id == request.id and e.token_id is not None]
        assert got == expected[0].token_ids[: len(got)]
        assert len(got) >= 9
    assert engine.pool.available == engine.pool.num_pages


def test_only_the_cached_prefixes_of_a_changed_adapter_are_dropped(tiny_tokenizer, folders):
    llm = LLM(
        model=base_of(), tokenizer=tiny_tokenizer, adapters={"first": folders["first"]}, page_size=8
    )
    (prompt,) = prompts_of([40])

    def cached(name):
        request = Request(prompt_ids=prompt, params=GREEDY, adapter=name)
        return next(e.cached_tokens for e in llm.engine.run([request]))

    assert [cached(name) for name in ("", "first")] == [0, 0]
    llm.load_adapter("second", folders["second"])
    assert [cached(name) for name in ("", "first", "second")] == [32, 32, 0]
    llm.unload_adapter("first")
    llm.load_adapter("first", folders["third"])
    assert [cached(name) for name in ("", "first", "second")] == [32, 0, 32]


def test_a_reloaded_name_is_the_new_adapter_and_ends_the_requests_of_the_old(
    tiny_tokenizer, folders
):
    llm = LLM(model=base_of(), tokenizer=tiny_tokenizer, adapters={"mine": folders["first"]})
    (old,) = long_requests(["mine"])
    llm.engine.add(old)
    llm.engine.step()
    llm.unload_adapter("mine")
    llm.load_adapter("mine", folders["second"])
    (new,) = long_requests(["mine"])
    events = list(llm.engine.run([new]))
    twin = LLM(model=base_of(), tokenizer=tiny_tokenizer, adapters={"mine": folders["second"]})
    (expected,) = twin.generate([list(new.prompt_ids)], new.params, adapter="mine")
    assert [e.token_id for e in events if e.request_id == new.id] == expected.token_ids
    assert [e.finish_reason for e in events if e.request_id == old.id] == ["cancelled"]
    assert not llm.engine.busy


def test_a_run_ends_if_its_adapter_is_unloaded(tiny_tokenizer, folders):
    llm = LLM(model=base_of(), tokenizer=tiny_tokenizer, adapters={"mine": folders["first"]})
    events = []
    for event in llm.engine.run(long_requests(["mine"])):
        events.append(event)
        if len(events) == 3:
            llm.unload_adapter("mine")
    assert [e.finish_reason for e in events] == [None, None, None, "cancelled"]


def test_the_compiled_step_returns_when_what_it_does_not_support_is_gone(tiny_tokenizer):
    model = base_of()
    engine = engine_of(model, tiny_tokenizer)
    (before,) = outcome(engine, requests_of([""]))
    attach(model, config_of("vera"))
    model.eval().requires_grad_(False)
    outcome(engine, requests_of([""]))
    assert engine.runner.fast_step is None
    detach(model)
    assert outcome(engine, requests_of([""])) == [before]
    assert isinstance(engine.runner.fast_step, CompiledStep)


def test_an_adapter_that_cannot_be_served_leaves_everything_as_it_was(tiny_tokenizer, folders):
    llm = LLM(model=base_of(), tokenizer=tiny_tokenizer, adapters={"first": folders["first"]})
    with pytest.raises(ConfigError, match="already has an adapter 'first'"):
        llm.load_adapter("first", folders["second"])
    with pytest.raises(ConfigError, match="needs a name"):
        llm.load_adapter("", folders["second"])
    with pytest.raises(ConfigError, match="no adapter 'other'"):
        llm.unload_adapter("other")
    assert llm.engine.adapter_names == ("first",)
    drafting = LLM(model=base_of(), tokenizer=tiny_tokenizer, draft="ngram")
    with pytest.raises(ConfigError, match="speculative decoding does not support"):
        drafting.load_adapter("first", folders["first"])
    assert drafting.engine.adapter_names == ()
    assert len(drafting.generate([[5, 6, 7]], GREEDY)[0].token_ids) == 10


def test_logits_of_a_step_follow_an_adapter_that_is_changed_in_place():
    """As in reinforcement learning, where the engine serves what is being trained."""
    model = base_of()
    adapters = place(model, CONFIGS["plain"])
    give_values(adapters, 0)
    ids = [list(prompts_of([12])[0])]
    before = logits_in_passes(model, ids, [[1] * 12], compiled=True, deterministic=True)[0]
    twin = copy.deepcopy(model)
    give_values(adapters, 1)
    after = logits_in_passes(model, ids, [[1] * 12], compiled=True, deterministic=True)[0]
    assert not torch.equal(before, after)
    assert torch.equal(twin.logits(ids[0], deterministic=True), before)
    assert torch.equal(model.logits(ids[0], deterministic=True), after)
