"""Tiny random models of `transformers`, and parts of their configurations."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

BASE = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "eos_token_id": 2,
    "bos_token_id": 1,
}


EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 40, "num_experts": 6}


DEEPSEEK = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def tiny_hf(model_type, changes):
    """Returns a tiny random model of `transformers` with random biases and norm weights."""
    base = {} if model_type == "gpt2" else BASE
    values = {**base, "vocab_size": 211, "initializer_range": 0.2} | changes
    values |= {"attn_implementation": "eager"}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **values)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name or name.endswith("bias"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.uniform_(buffer, 0, 0.5)
    return model.requires_grad_(False)
