"""Every family here and in `transformers`: equal logits for equal weights, in both directions."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from easyllm.models import load_model, save_model
from easyllm.models.families import FAMILIES
from tiny_hf import DEEPSEEK, EXPERTS, LLAMA3, YARN, tiny_hf

WINDOWS = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}

LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.9],
    "long_factor": [1.0, 2.5, 4.0, 7.0, 20.0, 40.0],
}


VARIANTS = {
    "gpt2": ("gpt2", {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 128}),
    "gpt2 untied": (
        "gpt2",
        {"n_embd": 48, "n_layer": 2, "n_head": 3, "n_inner": 100, "tie_word_embeddings": False},
    ),
    "llama mha untied": ("llama", {"num_key_value_heads": 4}),
    "llama gqa tied": ("llama", {"tie_word_embeddings": True}),
    "llama mqa biases": (
        "llama",
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    ),
    "llama wide heads": ("llama", {"head_dim": 32, "rope_theta": 500000.0}),
    "llama linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "llama dynamic": (
        "llama",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 32},
    ),
    "llama yarn": ("llama", {"rope_scaling": YARN}),
    "llama 3.1": ("llama", {"rope_scaling": LLAMA3}),
    "mistral": ("mistral", {"sliding_window": 9}),
    "mistral no window": ("mistral", {"sliding_window": None}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", {}),
    "qwen2 windows": ("qwen2", WINDOWS),
    "qwen2_moe": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 56}),
    "qwen2_moe normalised, some dense": (
        "qwen2_moe",
        EXPERTS
        | {"shared_expert_intermediate_size": 56, "norm_topk_prob": True, "mlp_only_layers": [1]},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", EXPERTS | {"head_dim": 16, "norm_topk_prob": True}),
    "glm": ("glm", {"head_dim": 16, "attention_bias": True}),
    "glm4": ("glm4", {"head_dim": 16, "attention_bias": True}),
    # Gemma's norm weights are offset by one, which doubles the logits and their rounding error:
    # smaller matrices
    "gemma": ("gemma", {"head_dim": 16, "initializer_range": 0.1}),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
        },
    ),
    "deepseek_v2": ("deepseek_v2", DEEPSEEK | {"q_lora_rank": None}),
    "deepseek_v2 groups, yarn": (
        "deepseek_v2",
        DEEPSEEK
        | {
            "topk_method": "group_limited_greedy",
            "n_group": 3,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
            "attention_bias": True,
            "rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4},
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        DEEPSEEK
        | {
            "n_group": 3,
            "topk_group": 2,
            "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "deepseek_v3 half-split": (
        "deepseek_v3",
        DEEPSEEK
        | {"n_group": 1, "topk_group": 1, "rope_interleave": False, "norm_topk_prob": False},
    ),
    "phi3": ("phi3", {}),
    "phi3 partial, window": ("phi3", {"partial_rotary_factor": 0.5, "sliding_window": 9}),
    "phi3 longrope, short": (
        "phi3",
        {"rope_scaling": LONG, "original_max_position_embeddings": 60},
    ),
    "phi3 longrope, long": (
        "phi3",
        {"rope_scaling": LONG, "original_max_position_embeddings": 59, "sliding_window": 9},
    ),
    "phi3 longrope, partial": (
        "phi3",
        {
            "rope_scaling": LONG
            | {"short_factor": [1.0, 1.5, 2.0], "long_factor": [1.0, 2.5, 9.0]}
            | {"attention_factor": 1.25},
            "original_max_position_embeddings": 32,
            "partial_rotary_factor": 0.5,
        },
    ),
    "gemma2": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 9}),
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_equal_transformers_and_the_saved_folder_loads_there(variant, tmp_path):
    reference = tiny_hf(*variant)
    reference.save_pretrained(tmp_path / "hf")
    ids = torch.randint(0, 211, (60,))
    expected = reference(ids[None]).logits[0]

    model = load_model(tmp_path / "hf")
    torch.testing.assert_close(model.logits(ids), expected, atol=3e-5, rtol=0)

    save_model(model, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    torch.testing.assert_close(again(ids[None]).logits[0], expected, atol=1e-6, rtol=0)


def test_every_family_has_a_variant():
    ours_alone = {"easyllm", "baichuan", "chatglm", "chatglm2", "glm_blocks", "internlm2", "yi"}
    names = {kind.removesuffix("_text") for kind, _ in VARIANTS.values()}
    assert names == set(FAMILIES) - ours_alone - {"t5"}  # see test_encoder_decoder
