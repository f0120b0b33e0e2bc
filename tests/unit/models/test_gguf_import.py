"""Models from GGUF files: configuration, names, row order, and metadata that does not match."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from easyllm.core.errors import CheckpointError
from easyllm.models import load_model
from easyllm.models.families import layout_of
from easyllm.models.families.gguf_layout import half_split_rows
from easyllm.models.gguf_import import hf_config
from easyllm.models.hf_config import read_config
from gguf_files import write_gguf
from gguf_writing import interleaved


@settings(max_examples=30, deadline=None)
@given(heads=st.integers(1, 6), half=st.integers(1, 8), tail=st.sampled_from([(), (1,), (5,)]))
def test_half_split_rows_inverts_the_order_of_llama_cpp(heads, half, tail):
    weight = np.random.default_rng(0).normal(size=(heads * half * 2, *tail)).astype(np.float32)
    theirs = torch.from_numpy(interleaved(weight, heads))
    assert np.array_equal(half_split_rows(theirs, heads).numpy(), weight)


LLAMA = {
    "general.architecture": "llama",
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.block_count": 2,
    "llama.context_length": 256,
    "llama.vocab_size": 320,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.key_length": 16,
    "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
}


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-12, 5e-6, 0.1])
def test_the_norms_epsilon_is_read_as_the_shortest_decimal(eps):
    stored = float(np.float32(eps))
    assert stored != eps
    key = "llama.attention.layer_norm_rms_epsilon"
    assert hf_config(LLAMA | {key: stored}, {})["rms_norm_eps"] == eps


def test_metadata_is_converted_to_a_config():
    ends = {"eos_token_id": 2, "eot_token_id": 7, "eom_token_id": 2, "bos_token_id": 1}
    metadata = LLAMA | {f"tokenizer.ggml.{key}": value for key, value in ends.items()}
    config = hf_config(metadata, {"output.weight": None})
    assert config["eos_token_id"] == [2, 7]
    assert config["bos_token_id"] == 1
    assert config["pad_token_id"] is None
    assert config["head_dim"] == 16
    assert config["vocab_size"] == 320
    assert config["rope_theta"] == 10000.0
    assert not config["tie_word_embeddings"]
    assert hf_config(LLAMA, {})["tie_word_embeddings"]
    tokens = {"tokenizer.ggml.tokens": ["a", "b"]}
    assert hf_config(LLAMA | tokens, {})["vocab_size"] == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"general.architecture": "mamba"},
            "'mamba' is not known.*; known architectures are baichuan, .*llama",
        ),
        ({"general.architecture": None}, "None is not known"),
        ({"general.type": "adapter"}, "of type 'adapter', expected 'model'"),
        ({"llama.attention.head_count_kv": [4, 2]}, r"head_count_kv=\[4, 2\].*every layer"),
        ({"llama.block_count": None}, "no llama.block_count"),
        ({"llama.expert_shared_count": 8}, "sets llama.expert_shared_count=8, which is not"),
        ({"llama.rope.scaling.type": "longrope"}, "sets llama.rope.scaling.type='longrope'"),
    ],
)
def test_unsupported_metadata_is_named(changes, words):
    with pytest.raises(CheckpointError, match=words):
        hf_config(LLAMA | changes, {})


def test_equal_values_for_all_layers_are_one_value():
    config = hf_config(LLAMA | {"llama.feed_forward_length": [64, 64]}, {})
    assert config["intermediate_size"] == 64


@pytest.mark.parametrize(
    ("keys", "ends"),
    [
        ({"eos_token_id": 0}, [0, 2]),  # the end of turn is found by its text
        ({"eos_token_id": 0, "eot_token_id": 3}, [0, 3, 2]),
        ({"eos_token_id": 2}, [2, 0]),
        ({"model": "llama"}, [2, 0]),  # sentencepiece's own ids if the file has none
        ({}, [0, 2]),
    ],
)
def test_eos_tokens_are_found_by_key_and_by_text(keys, ends):
    tokens = ["<|endoftext|>", "a", "<|im_end|>", "<own end>"]
    metadata = {f"tokenizer.ggml.{k}": v for k, v in (keys | {"tokens": tokens}).items()}
    assert hf_config(LLAMA | metadata, {})["eos_token_id"] == ends


@pytest.mark.parametrize(
    "text", ["<|eot_id|>", "<|end|>", "<end_of_turn>", "<EOT>", "_<EOT>", "<｜end▁of▁sentence｜>"]
)
def test_every_known_eos_text_is_found(text):
    metadata = {"tokenizer.ggml.tokens": ["a", "b", text], "tokenizer.ggml.eos_token_id": 1}
    assert hf_config(LLAMA | metadata, {})["eos_token_id"] == [1, 2]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output.weight", "lm_head.weight"),
        ("blk.11.ffn_down.weight", "model.layers.11.mlp.down_proj.weight"),
        ("blk.0.attn_q.bias", "model.layers.0.self_attn.q_proj.bias"),
    ],
)
def test_names_are_converted_to_hugging_face_names(theirs, ours):
    assert layout_of("llama").locate(theirs)[0] == ours


@pytest.mark.parametrize(
    "name",
    [
        *("blk.0.unheard_of.weight", "x", "output.scale", "blk.1.output.weight"),
        *("rope_freqs.bias", "blk.0.attn_rot_embd.bias"),
    ],
)
def test_an_unknown_name_is_not_converted(name):
    with pytest.raises(LookupError):
        layout_of("llama").locate(name)


def write_llama(path: Path, model, more=(), **changes) -> Path:
    """Writes the tiny model like llama.cpp's converter."""
    names = {
        "embed_tokens": "token_embd",
        "norm": "output_norm",
        "mixer_norm": "attn_norm",
        "feed_forward_norm": "ffn_norm",
        "mixer.q_proj": "attn_q",
        "mixer.k_proj": "attn_k",
        "mixer.v_proj": "attn_v",
        "mixer.o_proj": "attn_output",
        "feed_forward.gate_proj": "ffn_gate",
        "feed_forward.up_proj": "ffn_up",
        "feed_forward.down_proj": "ffn_down",
    }
    values = {key: value for key, value in (LLAMA | changes).items() if key.startswith("llama.")}
    metadata = [
        ("float32" if isinstance(value, float) else "uint32", key, value)
        for key, value in values.items()
    ]
    tensors = []
    for ours, parameter in model.state_dict().items():
        stem, _, kind = ours.rpartition(".")
        layer = ""
        if stem.startswith("layers."):
            _, number, stem = stem.split(".", 2)
            layer = f"blk.{number}."
        array = parameter.float().numpy()
        heads = {"mixer.q_proj": 4, "mixer.k_proj": 2}.get(stem)
        if heads is not None:
            array = interleaved(array, heads)
        tensors.append((f"{layer}{names[stem]}.{kind}", array, None))
    return write_gguf(path, metadata, [*tensors, *more])


def test_a_file_in_the_row_order_of_llama_cpp_gives_the_same_model(tmp_path, tiny_model):
    loaded = load_model(write_llama(tmp_path / "tiny.gguf", tiny_model))
    assert loaded.config.norm.eps == tiny_model.config.norm.eps == 1e-5
    assert loaded.config.layers == tiny_model.config.layers
    ours, theirs = tiny_model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(theirs[name], value), name
    ids = [1, 5, 9, 300]
    assert torch.equal(loaded.logits(ids), tiny_model.logits(ids))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"llama.attention.head_count": 0}, "does not describe a valid model"),
        ({"llama.attention.head_count_kv": 3}, "not divisible by num_kv_heads=3"),
        ({"llama.feed_forward_length": 48}, r"got \(64, 32\), expected \(48, 32\)"),
        ({"llama.block_count": 3}, "9 missing"),
        ({"llama.block_count": 1}, "9 unexpected"),
    ],
)
def test_metadata_that_contradicts_the_tensors_is_named(tmp_path, tiny_model, changes, words):
    path = write_llama(tmp_path / "tiny.gguf", tiny_model, **changes)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_model(path)
    assert "tiny.gguf" in str(caught.value)
    assert "config.json" not in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (
            ("blk.0.attn_q.bias", 64),
            r"do not match its metadata \(\d+ missing: .*; convert the file again",
        ),
        (
            ("blk.1.attn_q.bias", 64),
            r"do not match its metadata \(1 unexpected: .*; convert the file again",
        ),
        (("rope_freqs.bias", 8), r"not implemented for its architecture \(rope_freqs.bias\)"),
    ],
)
def test_a_superfluous_tensor_is_named_as_in_the_file(tmp_path, tiny_model, extra, words):
    name, length = extra
    more = (name, np.zeros(length, np.float32), None)
    path = write_llama(tmp_path / "tiny.gguf", tiny_model, more=[more])
    with pytest.raises(CheckpointError, match=words) as caught:
        load_model(path)
    assert "config.json" not in str(caught.value)


def test_gemma_2_without_a_window_gets_that_of_llama_cpp():
    values = {key.replace("llama.", "gemma2."): value for key, value in LLAMA.items()}
    values |= {"general.architecture": "gemma2"}
    windows = [layer.mixer.window for layer in read_config(hf_config(values, {})).layers]
    assert windows == [4096, None]
    values |= {"gemma2.attention.sliding_window": 9}
    windows = [layer.mixer.window for layer in read_config(hf_config(values, {})).layers]
    assert windows == [9, None]
