"""A tiny random model and its configuration, a chat template and a small corpus."""

import torch

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|im_start|>assistant\\n' }}{% endif %}"
)


CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "A language model predicts the next token from the tokens before it.",
    "user assistant system question answer what which where how many",
    "0123456789 你好，世界 hello world good morning",
] * 4


def tiny_config(**changes):
    """A Llama configuration of a few thousand parameters, as it appears in `config.json`."""
    return {
        "model_type": "llama",
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    } | changes


def build_tiny(seed: int = 0, **changes):
    """A tiny random model, by default a Llama; its weights are large, so logits are not flat."""
    from easyllm.models.families import family_of
    from easyllm.nn import Decoder

    hf = tiny_config(**changes)
    model = Decoder(family_of(hf["model_type"]).read_config(hf))
    generator = torch.Generator().manual_seed(seed)
    model.reset_parameters(std=0.3, generator=generator)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    return model.requires_grad_(False).eval()
