"""GGUF files written from a model: read by us and by the gguf package, type by type."""

import json

import gguf
import pytest
import torch

from easyllm.core.errors import CheckpointError, ConfigError, OutputError
from easyllm.models import load_model, load_tokenizer
from easyllm.models.gguf_export import gguf_types, save_gguf
from easyllm.pipeline.quantize_options import GGUF_TYPES
from easyllm.quant import quantize_weights
from easyllm.tokenizer.from_gguf import PRE_TOKENIZERS
from easyllm.tokenizer.to_gguf import pre_tokenizer_name
from tiny_models import build_tiny

IDS = torch.arange(5, 45)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS = {
    "llama": {},
    "llama, untied": {"tie_word_embeddings": False},
    "llama, biases": {"attention_bias": True},
    "llama, linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "llama, llama3": {"rope_scaling": LLAMA3},
    "mistral": {"sliding_window": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen3": {},
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("smollm2")


def model_of(kind, tokenizer, **changes):
    sizes = {"vocab_size": tokenizer.vocab_size, "hidden_size": 64, "intermediate_size": 96}
    values = sizes | KINDS[kind] | changes
    return build_tiny(model_type=kind.partition(",")[0], **values)


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_precision_file_is_the_same_model(kind, tokenizer, tmp_path):
    model = model_of(kind, tokenizer)
    save_gguf(model, tmp_path / "m.gguf", type="f32", tokenizer=tokenizer)
    again = load_model(tmp_path / "m.gguf")
    torch.testing.assert_close(again.logits(IDS), model.logits(IDS), rtol=0, atol=0)
    assert {name: tuple(p.shape) for name, p in again.named_parameters()} == {
        name: tuple(p.shape) for name, p in model.named_parameters()
    }


def test_the_command_knows_the_types_that_are_written():
    assert sorted(GGUF_TYPES) == sorted(gguf_types())


@pytest.mark.parametrize("type", gguf_types())
def test_every_type_is_written_and_read(type, tokenizer, tmp_path):
    model = model_of("llama", tokenizer, hidden_size=256, intermediate_size=512, head_dim=64)
    found = save_gguf(model, tmp_path / "m.gguf", type=type, tokenizer=tokenizer)
    assert not found.fallbacks
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    types = {tensor.name: tensor.tensor_type.name.lower() for tensor in reader.tensors}
    assert types == found.types
    assert types["blk.0.ffn_up.weight"] == type
    assert types["blk.0.attn_norm.weight"] == "f32"
    expected = type if type in ("f32", "f16", "bf16", "q8_0") else "q6_k"
    assert types["token_embd.weight"] == expected
    again = load_model(tmp_path / "m.gguf")
    drift = (again.logits(IDS) - model.logits(IDS)).norm() / model.logits(IDS).norm()
    assert drift < {"f32": 1e-7, "f16": 5e-3, "bf16": 0.1, "q8_0": 0.2}.get(type, 0.8)


def test_a_width_that_no_block_divides_gets_the_type_of_llama_cpp(tokenizer, tmp_path):
    model = model_of("llama", tokenizer, intermediate_size=80)
    found = save_gguf(model, tmp_path / "m.gguf", type="q4_k", tokenizer=tokenizer)
    assert found.types["blk.0.ffn_up.weight"] == "q5_0"  # 64 inputs
    assert found.types["blk.0.ffn_down.weight"] == "f16"  # 80 inputs
    assert found.fallbacks["blk.1.ffn_down.weight"] == "f16"
    assert found.types["token_embd.weight"] == "q8_0"
    assert "blk.0.attn_norm.weight" not in found.fallbacks
    load_model(tmp_path / "m.gguf").logits(IDS)


def test_the_tokenizer_and_its_template_travel(tokenizer, tmp_path):
    model = model_of("llama", tokenizer)
    save_gguf(model, tmp_path / "m.gguf", type="f16", tokenizer=tokenizer)
    again = load_tokenizer(tmp_path / "m.gguf")
    for text in ("Hello, world! 12345", "  two  spaces\n\n", "你好，世界", "it's I'LL 3.14"):
        assert again.encode(text) == tokenizer.encode(text)
    assert again.special == tokenizer.special
    assert again.template_sources == tokenizer.template_sources


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_rules_are_written_under_a_name_with_the_same_rules(name):
    rules = PRE_TOKENIZERS[name]().__getstate__()
    state = {
        "pre_tokenizer": json.loads(rules),
        "normalizer": {"type": "NFC"} if name == "qwen2" else None,
        "model": {"vocab": {"12": 0}},
    }
    found = pre_tokenizer_name(state)
    assert PRE_TOKENIZERS[found]().__getstate__() == rules
    if name.startswith("deepseek-") and "qwen" not in name:
        assert found == name


def test_deepseek_splits_numbers_into_digits_where_no_token_has_two():
    *steps, last = json.loads(PRE_TOKENIZERS["deepseek-llm"]().__getstate__())["pretokenizers"]
    steps[-1] = {"type": "Digits", "individual_digits": True}
    state = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, last]}}
    state |= {"normalizer": None, "model": {"vocab": {"1": 0, "2": 1}}}
    assert pre_tokenizer_name(state) == "deepseek-llm"
    state["model"] = {"vocab": {"1": 0, "12": 1}}
    with pytest.raises(CheckpointError, match="has no name for"):
        pre_tokenizer_name(state)


def test_a_tokenizer_that_llama_cpp_has_no_rules_for_is_refused():
    state = {"pre_tokenizer": {"type": "Whitespace"}, "normalizer": None}
    with pytest.raises(CheckpointError, match="has no name for"):
        pre_tokenizer_name(state)


def test_what_cannot_be_written_is_refused_and_nothing_is_left(tokenizer, tmp_path):
    model, path = model_of("llama", tokenizer), tmp_path / "m.gguf"
    with pytest.raises(ConfigError, match=r"GGUF type 'q4_0_k' is not known.*use f32"):
        save_gguf(model, path, type="q4_0_k", tokenizer=tokenizer)
    with pytest.raises(CheckpointError, match="quantized weights"):
        save_gguf(quantize_weights(model, "int8"), path, type="f16", tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())
    path.write_text("mine")
    with pytest.raises(OutputError, match="already exists"):
        save_gguf(model_of("llama", tokenizer), path, type="f16", tokenizer=tokenizer)
    assert path.read_text() == "mine"


def test_importance_changes_the_codes_of_the_linears_it_names(tokenizer, tmp_path):
    model = model_of("llama", tokenizer)
    importance = {"layers.0.mixer.q_proj": torch.logspace(-2, 2, 64)}
    for name, given in (("a", None), ("b", importance)):
        save_gguf(model, tmp_path / name, type="q4_0", tokenizer=tokenizer, importance=given)
    one, other = (gguf.GGUFReader(tmp_path / name).tensors for name in "ab")
    differing = {a.name for a, b in zip(one, other, strict=True) if (a.data != b.data).any()}
    assert differing == {"blk.0.attn_q.weight"}
