"""Law 6, bitwise: in deterministic mode, tokens and log-probabilities are batch-invariant.

They are also bitwise identical to the forward pass of training.
"""

import random

import pytest
import torch
from torch.nn.functional import cross_entropy

from easyllm.batches.packing import pack
from easyllm.core.errors import ConfigError
from easyllm.engine import LLM, Engine, Request, SamplingParams
from easyllm.engine.compiled_step import CompiledStep
from easyllm.engine.options import EngineConfig
from easyllm.engine.runner import logits_in_passes
from easyllm.examples.sample import Sample
from easyllm.nn.deterministic import check_deterministic, rowwise_logprobs
from easyllm.ops.deterministic import sums_have_fixed_order
from easyllm.ops.kernels.build import _library
from easyllm.quant import quantize_weights
from tiny_models import build_tiny

pytestmark = pytest.mark.skipif(_library() is None, reason="there is no C compiler")
WIDE = {"hidden_size": 96, "intermediate_size": 224, "num_attention_heads": 6}
KINDS, TIMES = 100, 10


def model_of(**changes):
    return build_tiny(seed=6, **WIDE | changes)


def bf16_is_tiled(model):
    """Whether products of the model's weights run in PyTorch, on a processor with bf16."""
    return not sums_have_fixed_order(model.dtype)


def request_kinds():
    """A hundred different requests: prompts of any length, greedy, sampled, penalties, copies."""
    draws = random.Random(0)
    kinds = []
    for number in range(KINDS):
        prompt = tuple(draws.randrange(3, 320) for _ in range(draws.choice([1, 3, 17, 40, 90])))
        params = SamplingParams(
            temperature=draws.choice([0.0, 0.8]),
            top_p=draws.choice([1.0, 0.9]),
            repetition_penalty=draws.choice([1.0, 1.2]),
            max_tokens=draws.randrange(1, 7),
            seed=number,
            ignore_eos=True,
        )
        kinds.append((prompt, params))
    return kinds


def engine_of(model, tokenizer, *, on=True, **options):
    values = {"deterministic": on, "compiled_step": on, "page_size": 8, "num_pages": 200}
    return Engine(model, tokenizer, EngineConfig(**values | options))


def outcome(engine, requests):
    """Returns tokens and log-probabilities of each request, in order."""
    found = {request.id: [] for request in requests}
    for event in engine.run(requests):
        found[event.request_id].append((event.token_id, event.logprob))
    return [found[request.id] for request in requests]


def alone_and_together(model, tokenizer, on):
    kinds = request_kinds()
    alone = [
        outcome(
            engine_of(model, tokenizer, on=on, prefix_caching=False),
            [Request(prompt_ids=prompt, params=params)],
        )[0]
        for prompt, params in kinds
    ]
    order = [number for number in range(KINDS) for _ in range(TIMES)]
    random.Random(1).shuffle(order)
    requests = [Request(prompt_ids=kinds[n][0], params=kinds[n][1]) for n in order]
    engine = engine_of(model, tokenizer, on=on, max_running=24, max_step_tokens=64)
    assert isinstance(engine.runner.fast_step, CompiledStep) == (on and not bf16_is_tiled(model))
    together = outcome(engine, requests)
    return [(alone[n], got) for n, got in zip(order, together, strict=True)]


def test_a_thousand_requests_in_random_batches_are_bitwise_identical_to_each_alone(tiny_tokenizer):
    pairs = alone_and_together(model_of(), tiny_tokenizer, on=True)
    assert len(pairs) == 1000
    assert all(alone == together for alone, together in pairs)


def test_without_the_mode_results_depend_on_the_batch(tiny_tokenizer):
    pairs = alone_and_together(model_of(), tiny_tokenizer, on=False)
    assert sum(alone != together for alone, together in pairs) > 100


@pytest.mark.parametrize("cache", [None, "bfloat16"])
def test_engine_log_probabilities_bitwise_equal_the_training_forward(tiny_tokenizer, cache):
    model = model_of()
    llm = LLM(model=model, tokenizer=tiny_tokenizer, deterministic=True, cache_dtype=cache)
    prompts = [list(prompt) for prompt, _ in request_kinds()[:30]]
    done = llm.generate(prompts, SamplingParams(temperature=0.9, max_tokens=9, ignore_eos=True))
    equal = []
    for prompt, each in zip(prompts, done, strict=True):
        scores = llm.score([*prompt, *each.token_ids])[len(prompt) - 1 :]
        equal.append(scores == each.logprobs)
    # a quantized cache stores other keys than the forward pass uses: the negative control
    assert all(equal) if cache is None else not all(equal)


def test_the_forward_pass_is_bitwise_identical_with_a_gradient(tiny_tokenizer):
    model = model_of()
    ids = [list(prompt) for prompt, _ in request_kinds()[:12] if len(prompt) > 1]
    batch = pack([Sample.from_mask(each) for each in ids])
    model.requires_grad_(True).train()
    context = batch.context(deterministic=True)
    logits = model.head(model(batch.token_ids, context), context)
    rows = rowwise_logprobs(logits, batch.labels)
    model.eval()
    at = 0
    for each in ids:
        alone = model.logits(each[:-1], deterministic=True)
        assert torch.equal(
            rowwise_logprobs(alone, torch.tensor(each[1:])), rows[at : at + len(each) - 1]
        )
        at += len(each) - 1


def test_gradients_match_the_default_mode_within_rounding(tiny_tokenizer):
    ids = [list(prompt) for prompt, _ in request_kinds()[:12] if len(prompt) > 1]
    batch = pack([Sample.from_mask(each) for each in ids])
    grads = []
    for on in (False, True):
        model = model_of().requires_grad_(True)
        context = batch.context(deterministic=on)
        logits = model.head(model(batch.token_ids, context), context)
        cross_entropy(logits, batch.labels, reduction="sum").backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, exact in zip(*grads, strict=True):
        torch.testing.assert_close(plain, exact, atol=1e-4 * float(plain.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_weights_are_batch_invariant(tiny_tokenizer, scheme):
    model = quantize_weights(model_of(), scheme)
    pairs = alone_and_together(model, tiny_tokenizer, on=True)
    assert all(alone == together for alone, together in pairs)


def test_bf16_weights_are_batch_invariant(tiny_tokenizer):
    pairs = alone_and_together(model_of().to(torch.bfloat16), tiny_tokenizer, on=True)
    assert all(alone == together for alone, together in pairs)


ARCHITECTURES = {
    "tied": {},
    "a head of its own": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "qk norm": {"model_type": "qwen3"},
    "wide offset norms": {"model_type": "gemma"},
}


def stepped(model, **options):
    """Returns the logits of 20 tokens one at a time, and those of one forward pass."""
    ids = list(range(5, 25))
    passes = {"deterministic": True, "compiled": True} | options
    (logits,) = logits_in_passes(model, [ids], [[1] * len(ids)], **passes)
    return logits, model.logits(ids, deterministic=True)


@pytest.mark.parametrize("scheme", [None, "int8", "int4", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_decoding_steps_compiled_or_not_give_the_bits_of_the_forward_pass(changes, dtype, scheme):
    model = model_of(**changes).to(dtype)
    if scheme:
        model = quantize_weights(model, scheme)
    for compiled in (True, False):
        one_by_one, whole = stepped(model, compiled=compiled)
        assert torch.equal(one_by_one, whole)


def test_results_are_bitwise_independent_of_the_number_of_threads(tiny_tokenizer):
    kinds = request_kinds()[:40]
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        engine = engine_of(model_of(), tiny_tokenizer, prefix_caching=False)
        requests = [Request(prompt_ids=prompt, params=params) for prompt, params in kinds]
        found.append(outcome(engine, requests))
    assert found[0] == found[1] == found[2]


def test_a_quantized_base_with_a_gradient_gives_the_bits_of_the_engine():
    """As in training of an adapter on a quantized base on what the engine generated."""
    model = quantize_weights(model_of(), "int4")
    ids = torch.arange(5, 45)
    plain = model.logits(ids, deterministic=True)
    model.requires_grad_(False)
    model.norm.weight.requires_grad_(True)
    model.layers[0].mixer_norm.weight.requires_grad_(True)
    context = pack([Sample.from_mask(ids.tolist())]).context(deterministic=True)
    logits = model.head(model(ids[:-1], context), context)
    assert torch.equal(logits, plain[:-1])
    logits.square().sum().backward()
    assert bool(model.layers[0].mixer_norm.weight.grad.any())


@pytest.mark.parametrize("position", ["window"])
def test_sliding_windows_are_batch_invariant(tiny_tokenizer, position):
    model = model_of()
    layers = tuple(
        layer.model_copy(update={"mixer": layer.mixer.model_copy(update={"window": 24})})
        for layer in model.config.layers
    )
    twin = type(model)(model.config.changed(layers=layers))
    twin.load_state_dict(model.state_dict())
    pairs = alone_and_together(twin.eval().requires_grad_(False), tiny_tokenizer, on=True)
    assert all(alone == together for alone, together in pairs)


def test_parts_that_cannot_be_batch_invariant_are_refused(tiny_tokenizer):
    with pytest.raises(ConfigError, match="not support deterministic mode: it needs a CPU, fp32"):
        check_deterministic(model_of().double())
    layers = tuple(
        layer.model_copy(update={"mixer": layer.mixer.model_copy(update={"softcap": 5.0})})
        for layer in model_of().config.layers
    )
    capped = type(model_of())(model_of().config.changed(layers=layers))
    with pytest.raises(ConfigError, match="layer 0 has attention with a soft cap"):
        check_deterministic(capped.eval().requires_grad_(False))


def test_an_activation_with_a_different_tail_computation_is_refused():
    config = model_of().config
    layers = tuple(
        layer.model_copy(
            update={"feed_forward": layer.feed_forward.model_copy(update={"activation": "gelu"})}
        )
        for layer in config.layers
    )
    model = type(model_of())(config.changed(layers=layers)).eval().requires_grad_(False)
    width = config.layers[0].feed_forward.intermediate_size
    assert width % 64
    with pytest.raises(ConfigError, match=f"layer 0 has gelu with an intermediate size of {width}"):
        check_deterministic(model)
