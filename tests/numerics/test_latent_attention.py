"""DeepSeek's latent attention and routing: cache, packing, adapters, quantization, export."""

import json

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from easyllm.adapters import LoRAConfig, adapter_of, attach, merge, save_adapter
from easyllm.core.errors import CheckpointError, ConfigError
from easyllm.engine import Engine, Request, SamplingParams
from easyllm.engine.kv_cache import KVCache
from easyllm.engine.runner import logits_in_passes
from easyllm.models import add_adapter, hf_module_name, load_model, save_model
from easyllm.nn.config import GLUConfig, MoEConfig
from easyllm.nn.context import ForwardContext
from easyllm.nn.deterministic import check_deterministic
from easyllm.nn.feed_forward import build_feed_forward
from easyllm.plan.kv_cache import cache_size
from tiny_hf import DEEPSEEK, YARN, tiny_hf

CLOSE = {"atol": 3e-5, "rtol": 0}
SCALED = {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}}
VARIANTS = {
    # a cache of 28 numbers, which the C kernel for pages does not read, and one of 32, which it can
    "v2": ("deepseek_v2", {"q_lora_rank": None}),
    "v3": ("deepseek_v3", SCALED | {"kv_lora_rank": 24, "n_group": 3, "topk_group": 2}),
}
cases = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture
def folder(variant, tmp_path):
    kind, changes = VARIANTS[variant]
    reference = tiny_hf(kind, DEEPSEEK | {"pad_token_id": 0} | changes)
    reference.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def ids_of(n, seed=0):
    return torch.randint(5, 200, (n,), generator=torch.Generator().manual_seed(seed))


def greedy(model, tokenizer, prompt, adapter=""):
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    request = Request(prompt_ids=tuple(prompt.tolist()), params=params, adapter=adapter)
    return list(Engine(model, tokenizer).run([request]))


def check_greedy(model, events, prompt, **options):
    """Checks that the engine's tokens and log-probabilities are those of a full forward pass."""
    text = torch.tensor([*prompt.tolist(), *(event.token_id for event in events)])
    scores = model.logits(text, **options).log_softmax(-1)
    for row, event in enumerate(events, len(prompt) - 1):
        assert event.token_id == scores[row].argmax()
        assert event.logprob == pytest.approx(scores[row].max().item(), abs=3e-5)


@cases
def test_the_cache_holds_one_latent_vector_and_one_rotated_key(folder):
    model = load_model(folder)
    mixer = model.config.layers[0].mixer
    numbers = mixer.kv_rank + mixer.rope_dim
    cache = KVCache(model.config, 5, 16, torch.float32, torch.device("cpu"))
    assert cache.num_bytes == 5 * 16 * model.config.num_layers * numbers * 4
    planned = cache_size(model.config, context=1, itemsize=4)
    assert planned.bytes_per_token == model.config.num_layers * numbers * 4


@cases
def test_the_engine_decodes_from_latent_vectors(folder, tiny_tokenizer):
    model, prompt = load_model(folder), ids_of(12)
    check_greedy(model, greedy(model, tiny_tokenizer, prompt), prompt)
    long = ids_of(100)  # a prompt that is not read from pages
    check_greedy(model, greedy(model, tiny_tokenizer, long), long)


@cases
def test_an_adapter_of_every_linear_is_decoded_saved_merged_and_exported(
    folder, tmp_path, tiny_tokenizer
):
    model, prompt = load_model(folder), ids_of(12)
    before = model.logits(prompt)
    attach(model, LoRAConfig(rank=2))
    names = {name.rpartition(".")[2] for name in adapter_of(model).linears}
    assert {"kv_a_proj", "kv_b_proj", "o_proj"} <= names
    for _, adapter in adapter_of(model).linears.values():
        torch.nn.init.normal_(adapter.lora_B, std=0.1)
    adapted = model.logits(prompt)
    assert not torch.allclose(adapted, before, atol=1e-2)
    check_greedy(model, greedy(model, tiny_tokenizer, prompt), prompt)

    save_adapter(model, tmp_path / "a", module_name=hf_module_name(model), base=str(folder))
    again = add_adapter(load_model(folder), tmp_path / "a", base=str(folder))
    torch.testing.assert_close(again.logits(prompt), adapted, **CLOSE)
    exported = save_model(merge(model), tmp_path / "merged")
    theirs = AutoModelForCausalLM.from_pretrained(exported, attn_implementation="eager")
    torch.testing.assert_close(theirs(prompt[None]).logits[0], adapted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", ["v3"])
def test_rows_with_different_adapters_are_decoded_in_one_batch(folder, tmp_path, tiny_tokenizer):
    for seed in (1, 2):
        model = load_model(folder)
        attach(model, LoRAConfig(rank=2), seed=seed)
        for _, adapter in adapter_of(model).linears.values():
            torch.nn.init.normal_(adapter.lora_B, std=0.1)
        name = hf_module_name(model)
        save_adapter(model, tmp_path / f"a{seed}", module_name=name, base=str(folder))
    model = load_model(folder)
    for seed in (1, 2):
        add_adapter(model, tmp_path / f"a{seed}", base=str(folder), name=f"a{seed}")
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    names, prompts = ["a1", "", "a2"], [ids_of(12, seed) for seed in range(3)]
    requests = [
        Request(prompt_ids=tuple(p.tolist()), params=params, adapter=name)
        for p, name in zip(prompts, names, strict=True)
    ]
    events = list(Engine(model, tiny_tokenizer).run(requests))
    for request, prompt, name in zip(requests, prompts, names, strict=True):
        own = [event for event in events if event.request_id == request.id]
        assert len(own) == 5
        check_greedy(model, own, prompt, adapter=name)


@cases
def test_int4_weights_are_decoded_like_their_dequantized_values(folder):
    quantized, rounded = load_model(folder, quantize="int4"), load_model(folder)
    assert "int4" in quantized.packed_formats()
    weights = dict(quantized.weight_modules())
    for name, holder in rounded.weight_modules():
        holder.weight.copy_(weights[name].storage.dense())
    ids = ids_of(30)
    expected = rounded.logits(ids)
    (cached,) = logits_in_passes(quantized, [ids.tolist()], [[20, 9, 1]])
    for ours in (quantized.logits(ids), cached):
        errors = (ours - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert errors.median() < 0.15  # a rounded activation may select another expert


@cases
def test_packed_sequences_equal_each_alone(folder):
    model, parts = load_model(folder), [ids_of(30), ids_of(21, seed=1)]
    context = ForwardContext.packed((30, 21))
    packed = model.head(model(torch.cat(parts), context)).split((30, 21))
    for ours, ids in zip(packed, parts, strict=True):
        torch.testing.assert_close(ours, model.logits(ids), **CLOSE)


@pytest.mark.parametrize("variant", ["v3"])
def test_the_bias_of_the_selection_stays_in_fp32(folder):
    model = load_model(folder, dtype="bfloat16")
    bias = model.layers[1].feed_forward.selection_bias
    assert bias.dtype == torch.float32
    assert torch.equal(bias, load_model(folder).layers[1].feed_forward.selection_bias)
    assert model.to(torch.float16).layers[1].feed_forward.selection_bias.dtype == torch.float32


@pytest.mark.parametrize("variant", ["v3"])
def test_predicted_tokens_beyond_the_last_layer_are_ignored_and_other_tensors_listed(folder):
    from safetensors.torch import load_file, save_file

    expected = load_model(folder).logits(ids_of(9))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.eh_proj.weight"] = torch.zeros(48, 96)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(load_model(folder).logits(ids_of(9)), expected)
    for i in range(12):
        tensors[f"model.surprise.{i}"] = torch.zeros(1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"12 unexpected: (model\.surprise\.\d+, ){9}.*and 2"):
        load_model(folder)


@pytest.mark.parametrize("variant", ["v2"])
@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("topk_method", "noaux_tc", r"topk_method='noaux_tc'.*'greedy' or"),
        ("norm_topk_prob", True, "norm_topk_prob=True"),
        ("moe_layer_freq", 2, "moe_layer_freq=2"),
        ("scoring_func", "sigmoid", "scoring_func='sigmoid'"),
    ],
)
def test_what_changes_the_computation_is_refused(folder, key, value, words):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(CheckpointError, match=words):
        load_model(folder)


@pytest.mark.parametrize("variant", ["v2"])
def test_deterministic_mode_is_refused_with_its_reason(folder):
    with pytest.raises(ConfigError, match="layer 0 has latent attention"):
        check_deterministic(load_model(folder))


EXPERTS = {"num_experts": 6, "experts_per_token": 2, "expert": GLUConfig(intermediate_size=8)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_groups": 4}, "num_groups must divide"),
        ({"num_groups": 3, "groups_per_token": 4}, "at most num_groups"),
        ({"num_groups": 6, "groups_per_token": 1}, "raise groups_per_token"),
        ({"selection_bias": True}, "needs routing sigmoid_topk"),
        ({"num_groups": 2, "routing": "topk_softmax"}, "softmax_topk or sigmoid_topk"),
    ],
)
def test_options_of_routing_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ValidationError, match=words):
        MoEConfig(**EXPERTS | options)


def test_tokens_are_limited_to_the_best_groups():
    config = MoEConfig(**EXPERTS, num_groups=3, normalise=False)
    moe = build_feed_forward(config, 4, 0)
    logits = torch.tensor([[5.0, 0, 4, 4, 1, 1], [0, 0, 1, 2, 0, 9]])
    weights, chosen = moe.route(logits)
    assert chosen.tolist() == [[0, 1], [5, 4]]
    torch.testing.assert_close(weights, logits.softmax(-1).gather(1, chosen))
    best_two = MoEConfig(
        **EXPERTS, num_groups=3, group_score="best_two", routing="sigmoid_topk", normalise=False
    )
    _, chosen = build_feed_forward(best_two, 4, 0).route(logits)
    assert sorted(chosen[0].tolist()) == [2, 3]


def test_the_bias_changes_the_selection_but_not_the_weights():
    config = MoEConfig(**EXPERTS, routing="sigmoid_topk", selection_bias=True, normalise=False)
    moe = build_feed_forward(config, 4, 0)
    moe.reset_parameters()
    logits = torch.tensor([[3.0, 2, 1, 0, -1, -2]])
    assert moe.route(logits)[1].tolist() == [[0, 1]]
    moe.selection_bias[5] = 2.0
    weights, chosen = moe.route(logits)
    assert chosen.tolist() == [[5, 0]]
    torch.testing.assert_close(weights, logits.gather(1, chosen).sigmoid())
