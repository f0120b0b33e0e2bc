"""Tiny random models of every family that is written as GGUF, in llama.cpp.

In F32 both programs compute the same sums in another order, except that llama.cpp reads GELU from a
table of F16 values (Gemma). In F16 it also rounds the activations of each product to F16, which
moves log-probabilities by some thousandths of a nat. That may select another expert where two have
almost the same score: a single step of a model with experts can differ by much more. llama.cpp
never generates an end token here, as it is asked to go on; so neither may the other program.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from figures import Figures

from easyllm.engine import LLM, SamplingParams
from easyllm.models.families import family_of
from easyllm.nn import Decoder
from easyllm.nn.context import ForwardContext
from easyllm.nn.moe import MoE, Routing

VOCAB, END, TOKENS = 320, 2, 64
EXACT, ROUNDED = 2e-3, 3e-2
"""Bounds of a log-probability's difference, with exact and with rounded activations."""
EXPERT_TIE = 5e-4
"""Difference of two scores of experts between which rounded activations may decide otherwise."""
NEAR_TIE = 0.1  # nats
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 24}
GEMMA |= {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
GEMMA |= {"tie_word_embeddings": True}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_group": 1,
    "topk_group": 1,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
CHATGLM = {
    "padded_vocab_size": VOCAB,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_layers": 3,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "add_qkv_bias": True,
    "seq_length": 512,
    "layernorm_epsilon": 1e-5,
    "rmsnorm": True,
    "post_layer_norm": True,
    "rope_ratio": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
THIRD = DEEPSEEK | {"n_routed_experts": 12, "n_group": 3, "topk_group": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama, biases of none, Llama 3's RoPE": BASE | {"model_type": "llama", "rope_scaling": LLAMA3},
    "mistral": BASE | {"model_type": "mistral", "sliding_window": None},
    "mixtral": BASE | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": BASE | {"model_type": "qwen2"},
    "qwen3": BASE | {"model_type": "qwen3", "head_dim": 16},
    "yi": BASE | {"model_type": "Yi", "rope_theta": 5e6},
    "internlm2": BASE | {"model_type": "internlm2", "rope_theta": 1e6},
    "phi3": BASE | {"model_type": "phi3", "original_max_position_embeddings": 512},
    "baichuan 7B": BASE
    | {"model_type": "baichuan", "num_key_value_heads": 4, "num_hidden_layers": 32},
    "baichuan 13B": BASE
    | {
        "model_type": "baichuan",
        "num_key_value_heads": 4,
        "num_hidden_layers": 40,
        "max_position_embeddings": None,
        "model_max_length": 512,
    },
    "baichuan2 13B": BASE
    | {
        "model_type": "baichuan",
        "num_key_value_heads": 4,
        "num_hidden_layers": 40,
        "max_position_embeddings": None,
        "model_max_length": 512,
        "norm_head": True,
    },
    "chatglm2": CHATGLM
    | {"model_type": "chatglm", "_name_or_path": "THUDM/chatglm2-6b", "rope_ratio": 4},
    "chatglm3": CHATGLM
    | {"model_type": "chatglm", "_name_or_path": "THUDM/chatglm3-6b-32k", "rope_ratio": 50},
    "gemma": BASE | GEMMA | {"model_type": "gemma"},
    "gemma2": BASE
    | GEMMA
    | {"model_type": "gemma2", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3": BASE
    | GEMMA
    | {"model_type": "gemma3_text", "num_hidden_layers": 7, "rope_theta": 1e6},
    "deepseek_v2": BASE | DEEPSEEK | {"model_type": "deepseek_v2", "routed_scaling_factor": 2.5},
    "deepseek_v2 lite": BASE
    | DEEPSEEK
    | {"model_type": "deepseek_v2", "q_lora_rank": None, "num_hidden_layers": 27},
    "deepseek_v3": BASE | THIRD | {"model_type": "deepseek_v3", "routed_scaling_factor": 2.5},
    "deepseek_v3, YaRN": BASE
    | THIRD
    | {"model_type": "deepseek_v3", "rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}},
}


def random_model(hf: Mapping[str, Any]) -> Decoder:
    """Returns a random model with random biases and norms.

    Its weights shrink with depth, so that a deep model has a distribution like a shallow one's.
    """
    config = family_of(hf["model_type"]).read_config(hf)
    model = Decoder(config)
    generator = torch.Generator().manual_seed(0)
    model.reset_parameters(std=0.15 * (3 / config.num_layers) ** 0.5, generator=generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "embed_tokens.weight" and config.tie_embeddings:
                parameter.mul_(0.3)  # or each token would be followed by itself
            elif name.endswith("bias"):
                parameter.uniform_(-0.3, 0.3, generator=generator)
            elif "norm" in name:
                unit = 0.0 if config.norm.unit_offset else 1.0
                parameter.uniform_(unit - 0.5, unit + 0.5, generator=generator)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def check(
    figures: Figures,
    name: str,
    model: Decoder,
    prompt: Sequence[int],
    steps: Sequence[Mapping[str, Any]],
) -> None:
    """Compares llama.cpp's greedy tokens, and their log-probabilities, with a file read here.

    Args:
        name: ends with the type of the weights, `f32` or `f16`.
        model: the model of the same file.
        steps: llama.cpp's tokens after `prompt`, with their most likely candidates.
    """
    theirs = [step["id"] for step in steps]
    ids, routing = [*prompt, *theirs[:-1]], list[Routing]()
    context = ForwardContext.packed([len(ids)], routing=routing)
    logits = model.head(model(torch.tensor(ids), context), context)[len(prompt) - 1 :]
    rows = logits.log_softmax(-1)
    exact = name.endswith("f32")
    each = margins(model, routing, len(ids))[len(prompt) - 1 :]
    clear = [exact or margin > EXPERT_TIE for margin in each]
    off = [
        max(abs(float(row[top["id"]]) - top["logprob"]) for top in step["top_logprobs"])
        for row, step, counts in zip(rows, steps, clear, strict=True)
        if counts
    ]
    unclear = f" ({len(steps) - len(off)} steps with a near tie of experts)" * (False in clear)
    figures.at_most(f"{name}: log-probabilities{unclear}", max(off), EXACT if exact else ROUNDED)
    llm = LLM(model=model, max_running=1, cache_dtype="float32")
    params = SamplingParams(
        temperature=0, max_tokens=TOKENS, ignore_eos=True, logit_bias={END: -100.0}
    )
    ours = list(llm.generate([list(prompt)], params)[0].token_ids)
    first = next((i for i in range(TOKENS) if ours[i] != theirs[i]), TOKENS)
    if exact or first == TOKENS:
        figures.equal(f"{name}: greedy", ours, theirs)
        return
    gap = float(rows[first, ours[first]] - rows[first, theirs[first]])
    print(f"    token {first}: {gap:.3f} nats apart{'' if clear[first] else ', experts tie'}")
    figures.true(f"{name}: greedy", not clear[first] or gap < NEAR_TIE, f"equal up to {first}")


def margins(model: Decoder, routing: Sequence[Routing], count: int) -> list[float]:
    """Returns how close each token's choice of experts, or of groups, is: the smallest difference.

    It is the difference of the scores of the last one chosen and the best one not chosen, over all
    layers; infinite without experts.
    """
    found = torch.full((count,), float("inf"))
    for layer in routing:
        moe = model.layers[layer.layer].feed_forward
        assert isinstance(moe, MoE)
        config, scores = layer.config, layer.logits.softmax(-1)
        if config.routing == "sigmoid_topk":
            scores = layer.logits.sigmoid()
            scores = scores if moe.selection_bias is None else scores + moe.selection_bias
        if config.num_groups > 1:
            best = 2 if config.group_score == "best_two" else 1
            groups = scores.unflatten(1, (config.num_groups, -1)).topk(best, -1).values.sum(-1)
            found = torch.minimum(found, _margin(groups, config.groups_per_token))
            allowed = moe._selection_scores(layer.logits.sigmoid())
            scores = scores.masked_fill(allowed.isinf(), float("-inf"))
        found = torch.minimum(found, _margin(scores, config.experts_per_token))
    return found.tolist()


def _margin(scores: torch.Tensor, count: int) -> torch.Tensor:
    best = scores.sort(-1, descending=True).values
    return best[:, count - 1] - best[:, count]


__all__ = ["FAMILIES", "TOKENS", "VOCAB", "check", "random_model"]
