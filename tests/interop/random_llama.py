"""Random Llama models, and the dequantized weights of a model by their Hugging Face names."""

import torch
from torch import Tensor

from easyllm.models.families import family_of
from easyllm.nn import Decoder

CONFIG = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 576,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Two layers of SmolLM2's width."""


def random_llama(*, std: float = 0.05, **changes: object) -> Decoder:
    """Returns the same random model in each call.

    Args:
        std: standard deviation of the weights.
        changes: values of `CONFIG` to change.
    """
    model = Decoder(family_of("llama").read_config({**CONFIG, **changes}))
    model.reset_parameters(std=std, generator=torch.Generator().manual_seed(0))
    return model.requires_grad_(False).eval()


def hf_weights(model: Decoder) -> dict[str, Tensor]:
    """Returns the dequantized weights of the linears inside the layers, [N, K] fp32."""
    found = {}
    for name, layer in model.weight_modules():
        if name.startswith("layers."):
            name = name.replace(".mixer.", ".self_attn.").replace(".feed_forward.", ".mlp.")
            found[f"model.{name}"] = layer.storage.dense().float()
    return found


__all__ = ["hf_weights", "random_llama"]
