"""Virtual tokens are tokens: packed = alone, cached = uncached, served = computed at once.

Law 8 for prompt-learning methods: an adapter in its file, without encoder, equals the trained one.
"""

import pytest
import torch

from easyllm.adapters import (
    PrefixTuningConfig,
    PromptTuningConfig,
    adapter_of,
    attach,
    detach,
    merge,
)
from easyllm.batches.collate import left_pad, next_logits
from easyllm.batches.packing import pack
from easyllm.core.errors import ConfigError
from easyllm.engine import LLM, Engine, EngineConfig, Request, SamplingParams
from easyllm.examples.sample import Sample
from easyllm.models import load_model
from easyllm.models.families import family_of
from easyllm.nn.context import ForwardContext
from easyllm.nn.decoder import Decoder
from easyllm.nn.recompute import recompute_activations
from easyllm.quant import quantize_weights
from easyllm.train.objectives import LanguageModel
from prompt_adapters import CONFIGS, adapted, load, save
from tiny_models import build_tiny, tiny_config

IDS = torch.arange(5, 45)
GREEDY = {"temperature": 0, "ignore_eos": True}
METHODS = pytest.mark.parametrize("name", CONFIGS)


def adapted_tiny(name, **changes):
    return adapted(build_tiny(**changes), CONFIGS[name])


def rows_of(lengths, seed=4):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 320, (n,), generator=generator).tolist() for n in lengths]


# ---- virtual tokens equal real ones


@pytest.mark.parametrize("scale", [1.0, 5.5])
def test_embeddings_of_a_text_as_a_prompt_equal_the_text_in_front(scale):
    """Also with an embedding scale, which the vectors contain already."""
    plain = build_tiny()
    model = Decoder(plain.config.changed(embedding_scale=scale)).eval()
    model.load_state_dict(plain.state_dict())
    start, text = [7, 8, 9, 10, 11], IDS.tolist()
    expected = model.logits([*start, *text])[5:]
    config = PromptTuningConfig(num_virtual_tokens=5, init="text", init_token_ids=tuple(start))
    attach(model, config)
    torch.testing.assert_close(model.logits(text), expected, atol=1e-5, rtol=0)


class Recorder:
    """Records the keys and values of a forward pass, [T, K, d] for each layer."""

    def __init__(self):
        self.found = []

    def keys_values(self, layer, k, v):
        self.found.append((k, v))
        return k, v


@pytest.mark.parametrize("family", ["llama", "gpt2"], ids=["RoPE", "learned positions"])
def test_keys_and_values_of_a_text_as_a_prefix_equal_the_text_in_front(family):
    """The keys of a prefix are not rotated, and the positions after it start at its length."""
    values = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 320}
    values = tiny_config() if family == "llama" else values | {"model_type": "gpt2"}
    model = Decoder(family_of(family).read_config(values)).eval()
    model.reset_parameters(std=0.3, generator=torch.Generator().manual_seed(0))
    start, text, recorder = [7, 8, 9, 10, 11], IDS.tolist(), Recorder()
    expected = model.logits([*start, *text])[5:]
    positions = torch.arange(5)
    context = ForwardContext(positions=positions, lengths=(5,), virtual=recorder)
    with torch.no_grad():
        model(torch.tensor(start), context)
    table = attach(model, PrefixTuningConfig(num_virtual_tokens=5)).model_adapter.table
    slots = [x.flatten(1) for layer in recorder.found for x in layer]  # keys, values, keys ...
    with torch.no_grad():
        table.embedding.copy_(torch.cat(slots, dim=1))
    torch.testing.assert_close(model.logits(text), expected, atol=1e-5, rtol=0)


# ---- one computation in several ways


@METHODS
def test_packed_equals_alone_and_left_padded(name):
    model, rows = adapted_tiny(name), rows_of([5, 1, 23, 14])
    batch = pack([Sample.from_mask(row) for row in rows if len(row) > 1])
    with torch.no_grad():
        packed = model.head(model(batch.token_ids, batch.context()))
    alone = torch.cat([model.logits(row)[:-1] for row in rows if len(row) > 1])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)
    padded = left_pad(rows, 0)
    last = torch.stack([model.logits(row)[-1] for row in rows])
    with torch.no_grad():
        got = next_logits(model, padded.token_ids, padded.mask)
    torch.testing.assert_close(got, last, atol=1e-5, rtol=0)


@METHODS
def test_served_equals_computed_at_once_with_preemption_and_prefix_caching(name, tiny_tokenizer):
    model = adapted_tiny(name)
    (base,) = rows_of([30])
    requests = [
        Request(
            prompt_ids=(*base[: 6 + 3 * i], 5, 7),
            params=SamplingParams(**GREEDY, max_tokens=14),
        )
        for i in range(6)
    ]
    tight = EngineConfig(
        page_size=4, num_pages=14, max_running=6, max_step_tokens=9, cache_dtype="float32"
    )
    engine = Engine(model, tiny_tokenizer, tight)
    got = {request.id: [] for request in requests}
    for event in engine.run(requests):
        got[event.request_id].append((event.token_id, event.logprob))
    assert engine.scheduler.num_preemptions > 0
    assert engine.pool.available == 14
    for request in requests:
        ids, logprobs = zip(*got[request.id], strict=True)
        logits = model.logits([*request.prompt_ids, *ids])[len(request.prompt_ids) - 1 : -1]
        assert logits.argmax(-1).tolist() == list(ids)
        expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert logprobs == pytest.approx(expected.tolist(), abs=3e-5)


@METHODS
def test_virtual_tokens_are_computed_once_for_all_requests(name, tiny_tokenizer):
    """Their pages are found by prefix caching, although the prompts have nothing in common."""
    llm = LLM(model=adapted_tiny(name), tokenizer=tiny_tokenizer, page_size=4, max_running=1)
    params = SamplingParams(**GREEDY, max_tokens=1)
    computed, forward = [], llm.model.forward
    llm.model.forward = lambda ids, context: computed.append(ids.numel()) or forward(ids, context)
    for prompt in ([5, 6, 7], [80, 81, 82]):
        llm.generate([prompt], params)
    assert computed == [8, 4]  # 5 + 3 tokens, then all but the page of 4 virtual tokens


@METHODS
def test_a_folded_adapter_equals_the_trained_one_bitwise(name, tmp_path):
    model = adapted_tiny(name)
    folder = save(model, tmp_path / "a")
    again = load(build_tiny(), folder)
    assert torch.equal(again.logits(IDS), model.logits(IDS))
    names = set(dict(again.model_adapter.named_parameters()))
    assert names == {"table.embedding"}  # no encoder
    assert not any(p.requires_grad for p in again.parameters())
    twice = load(build_tiny(), save(again, tmp_path / "b"))
    assert torch.equal(twice.logits(IDS), model.logits(IDS))


@METHODS
def test_a_quantized_base_is_adapted(name, tmp_path):
    model = adapted(quantize_weights(build_tiny(), "int8"), CONFIGS[name])
    plain = quantize_weights(build_tiny(), "int8")
    assert not torch.allclose(model.logits(IDS), plain.logits(IDS), atol=1e-2)
    again = load(plain, save(model, tmp_path / "a"))
    assert torch.equal(again.logits(IDS), model.logits(IDS))


@METHODS
def test_peft_computes_the_same_logits_with_a_saved_adapter(name, tiny_folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = adapted(load_model(tiny_folder, dtype="float32"), CONFIGS[name])
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    reference = PeftModel.from_pretrained(base, save(model, tmp_path / "a")).eval()
    with torch.no_grad():
        expected = reference(input_ids=IDS[None]).logits[0][-len(IDS) :]
    torch.testing.assert_close(model.logits(IDS), expected, atol=3e-5, rtol=0)


# ---- training


@METHODS
@pytest.mark.parametrize("mode", ["none", "full"])
def test_only_the_adapter_has_a_gradient_equal_to_finite_differences(name, mode):
    """In every parameter, along a random direction, in fp64; with recomputed activations too."""
    model = recompute_activations(adapted_tiny(name).double(), mode)
    model.train()
    batch = pack([Sample.from_mask(row) for row in rows_of([9, 5])])
    trained = adapter_of(model).trained_parameters(model)
    LanguageModel().loss(model, batch).sum.backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == set(trained)
    generator = torch.Generator().manual_seed(0)
    for parameter in trained.values():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        direction *= 1e-6 / direction.norm()
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * direction)
                losses.append(float(LanguageModel().loss(model, batch).sum))
                parameter.sub_(sign * direction)
        expected = float((parameter.grad * direction).sum())
        assert (losses[0] - losses[1]) / 2 == pytest.approx(expected, rel=1e-4, abs=1e-13)


# ---- removal


@METHODS
def test_detached_equals_base_and_merging_is_refused(name):
    model = adapted_tiny(name)
    with pytest.raises(ConfigError, match="its virtual tokens are rows of the input, not changes"):
        merge(model)
    assert model.num_virtual_tokens == 5
    assert torch.equal(detach(model).logits(IDS), build_tiny().logits(IDS))
