"""Laws 2, 3 and 6: packed = alone, cached = uncached, engine log-probabilities = the forward's."""

import pytest
import torch

from easyllm.batches.packing import pack
from easyllm.engine import Engine, Request, SamplingParams
from easyllm.engine.runner import logits_in_passes
from easyllm.examples.sample import Sample
from tiny_models import build_tiny

VARIANTS = {"gqa": {}, "mqa": {"num_key_value_heads": 1}, "untied": {"tie_word_embeddings": False}}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def model(request):
    return build_tiny(seed=3, **request.param)


def sequences(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 320, (n,), generator=generator).tolist() for n in lengths]


def test_packed_sequences_equal_each_alone(model):
    parts = sequences([5, 1, 40, 17])
    batch = pack([Sample(tuple(p), tuple(p)) for p in parts])
    hidden = model.head(model(batch.token_ids, batch.context()))
    alone = torch.cat([model.logits(p) for p in parts])
    torch.testing.assert_close(hidden, alone, atol=2e-5, rtol=0)


def test_a_change_in_one_sequence_leaves_its_neighbours_bitwise_unchanged(model):
    first, second, third = sequences([12, 9, 21])
    a = pack([Sample(tuple(p), tuple(p)) for p in (first, second, third)])
    b = pack([Sample(tuple(p), tuple(p)) for p in (first, second[::-1], third)])
    out_a, out_b = model(a.token_ids, a.context()), model(b.token_ids, b.context())
    assert torch.equal(out_a[:12], out_b[:12])
    assert torch.equal(out_a[21:], out_b[21:])
    assert not torch.equal(out_a[12:21], out_b[12:21])


@pytest.mark.parametrize("pieces", [[1] * 30, [20, 1, 1, 8], [7, 23], [29, 1]])
def test_prefill_and_decode_through_the_cache_equal_one_forward(model, pieces):
    # in fp64: in fp32 the rounding of a row depends on the number of rows and on the machine
    model = model.double()
    (ids,) = sequences([30], seed=5)
    (logits,) = logits_in_passes(model, [ids], [pieces])
    torch.testing.assert_close(logits, model.logits(ids), atol=1e-12, rtol=0)


def test_requests_in_a_batch_equal_each_alone(model, tiny_tokenizer):
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts = sequences([3, 30, 11, 1, 64], seed=8)
    together = run(Engine(model, tiny_tokenizer), prompts, params)
    for prompt, tokens in zip(prompts, together, strict=True):
        assert run(Engine(model, tiny_tokenizer), [prompt], params) == [tokens]


def test_sampled_requests_are_batch_invariant(model, tiny_tokenizer):
    prompts = sequences([6, 6, 19], seed=2)
    params = SamplingParams(temperature=0.9, top_k=40, top_p=0.9, seed=11, max_tokens=10)
    together = run(Engine(model, tiny_tokenizer), prompts, params)
    assert run(Engine(model, tiny_tokenizer), [prompts[2]], params) == [together[2]]


def test_a_late_request_joins_a_running_batch(model, tiny_tokenizer):
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    early, late = sequences([10, 14], seed=4)
    engine = Engine(model, tiny_tokenizer)
    first = Request(prompt_ids=tuple(early), params=params)
    second = Request(prompt_ids=tuple(late), params=params)
    tokens = {first.id: [], second.id: []}
    engine.add(first)
    for step in range(20):
        if step == 3:
            engine.add(second)
        for event in engine.step():
            tokens[event.request_id].append(event.token_id)
    assert tokens[first.id] == run(Engine(model, tiny_tokenizer), [early], params)[0]
    assert tokens[second.id] == run(Engine(model, tiny_tokenizer), [late], params)[0]


def test_engine_logprobs_equal_those_of_the_training_forward(model, tiny_tokenizer):
    (prompt,) = sequences([15], seed=6)
    request = Request(
        prompt_ids=tuple(prompt), params=SamplingParams(temperature=0.7, seed=1, max_tokens=20)
    )
    events = list(Engine(model, tiny_tokenizer).run([request]))
    ids = prompt + [e.token_id for e in events]
    logprobs = model.logits(ids).log_softmax(-1)
    for offset, event in enumerate(events):
        expected = logprobs[len(prompt) + offset - 1, event.token_id].item()
        assert event.logprob == pytest.approx(expected, abs=3e-5)


def run(engine, prompts, params):
    requests = [Request(prompt_ids=tuple(p), params=params) for p in prompts]
    tokens = {r.id: [] for r in requests}
    for event in engine.run(requests):
        tokens[event.request_id].append(event.token_id)
    return list(tokens.values())
