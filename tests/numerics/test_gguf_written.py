"""GGUF files written here: tensors as llama.cpp's converter writes them, and read back equal."""

import gguf
import numpy as np
import pytest
import torch

from easyllm.core.errors import CheckpointError
from easyllm.models import load_model
from easyllm.models.families import family_of
from easyllm.models.gguf_export import save_gguf
from easyllm.models.scratch import build_scratch
from gguf_writing import tensors_of
from tiny_hf import DEEPSEEK, YARN, tiny_hf

GEMMA = {"head_dim": 16, "initializer_range": 0.1, "pad_token_id": 0}
SECOND = GEMMA | {"query_pre_attn_scalar": 16, "sliding_window": 9}
THIRD = SECOND | {
    "num_hidden_layers": 7,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
}
CASES = {
    "gemma": ("gemma", GEMMA),
    "gemma2": ("gemma2", SECOND),
    "gemma3": ("gemma3_text", THIRD),
    "phi3": ("phi3", {"pad_token_id": 0}),
}
TWO_PARTS = DEEPSEEK | {"pad_token_id": 0}
DEEPSEEKS = {
    "v2": ("deepseek_v2", TWO_PARTS | {"routed_scaling_factor": 2.5}),
    "v2-lite": (
        "deepseek_v2",
        TWO_PARTS | {"q_lora_rank": None, "num_hidden_layers": 27, "initializer_range": 0.05},
    ),
    "v3, yarn": (
        "deepseek_v3",
        TWO_PARTS
        | {
            "n_routed_experts": 12,
            "n_group": 3,
            "topk_group": 2,
            "rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7},
        },
    ),
}


def written(kind, changes, tmp_path, tokenizer, type="f32"):
    """Writes a tiny model of `transformers`; returns it, ours and the file."""
    reference = tiny_hf(kind, changes | {"vocab_size": 320})
    reference.save_pretrained(tmp_path / "hf")
    model = load_model(tmp_path / "hf")
    save_gguf(model, tmp_path / "m.gguf", type=type, tokenizer=tokenizer)
    return reference, model, tmp_path / "m.gguf"


def difference(model, path):
    ids = torch.randint(5, 300, (40,), generator=torch.Generator().manual_seed(0))
    return (load_model(path).logits(ids) - model.logits(ids)).abs().max()


@pytest.mark.parametrize("name", CASES)
def test_tensors_are_those_of_llama_cpps_converter(name, tmp_path, tiny_tokenizer):
    reference, model, path = written(*CASES[name], tmp_path, tiny_tokenizer)
    expected = dict(tensors_of(reference, name))
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_array_equal(found[key].view(np.float32).reshape(values.shape), values)
    assert difference(model, path) < 3e-5


@pytest.mark.parametrize("name", DEEPSEEKS)
def test_a_file_of_deepseek_holds_the_same_model(name, tmp_path, tiny_tokenizer):
    reference, model, path = written(*DEEPSEEKS[name], tmp_path, tiny_tokenizer)
    assert difference(model, path) < 3e-5
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, len(model.layers))
    assert names.get_name("model.layers.1.self_attn.kv_b_proj") + ".weight" not in tensors
    heads, rank, nope, value = 4, 20, 12, 16
    both = reference.get_parameter("model.layers.1.self_attn.kv_b_proj.weight").numpy()
    both = both.reshape(heads, nope + value, rank)
    keys = tensors[names.get_name("model.layers.1.self_attn.k_b_proj") + ".weight"]
    values = tensors[names.get_name("model.layers.1.self_attn.v_b_proj") + ".weight"]
    np.testing.assert_array_equal(
        keys.data.view(np.float32).reshape(heads, rank, nope), both[:, :nope].swapaxes(1, 2)
    )
    np.testing.assert_array_equal(
        values.data.view(np.float32).reshape(heads, value, rank), both[:, nope:]
    )


def test_parts_of_a_matrix_in_blocks_are_read_like_full_ones(tmp_path, tiny_tokenizer):
    changes = {"kv_lora_rank": 32, "qk_nope_head_dim": 32, "initializer_range": 0.05}
    _, model, path = written(
        *("deepseek_v2", TWO_PARTS | changes), tmp_path, tiny_tokenizer, "q8_0"
    )
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert kinds["blk.1.attn_k_b.weight"] == kinds["blk.1.attn_v_b.weight"] == "Q8_0"
    assert difference(model, path) < 0.2


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("gemma2", SECOND | {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar=24, expected 16"),
        ("gemma3_text", THIRD | {"layer_types": ["full_attention"] * 7}, "windows in other layers"),
        ("gemma3_text", THIRD | {"attention_bias": True}, "biases of attention"),
        ("deepseek_v2", TWO_PARTS | {"q_lora_rank": None}, "one projection of queries"),
        (
            "deepseek_v2",
            TWO_PARTS | {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2},
            "selects groups of experts by their best one",
        ),
        ("deepseek_v3", TWO_PARTS | {"n_group": 3, "topk_group": 2}, "groups of 2 experts"),
        (
            "deepseek_v3",
            TWO_PARTS | {"n_group": 1, "topk_group": 1, "rope_interleave": False},
            "rotates the two halves",
        ),
        (
            "deepseek_v2",
            TWO_PARTS | {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4}},
            "scales cos and sin",
        ),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_not_written(
    kind, changes, words, tmp_path, tiny_tokenizer
):
    with pytest.raises(CheckpointError, match=words):
        written(kind, changes, tmp_path, tiny_tokenizer)


def test_longrope_is_refused(tmp_path, tiny_tokenizer):
    """llama.cpp selects its factors by the context that it reserves, not by the text's length."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_type": "longrope"}
    config = family_of("phi3").read_config(
        {
            "model_type": "phi3",
            "vocab_size": 320,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "original_max_position_embeddings": 64,
            "rope_scaling": factors,
        }
    )
    model = build_scratch(config, seed=0)
    with pytest.raises(CheckpointError, match="cannot represent the RoPE scaling 'longrope'"):
        save_gguf(model, tmp_path / "m.gguf", type="f32", tokenizer=tiny_tokenizer)
    assert not list(tmp_path.iterdir())
