"""Mistral: the Llama architecture with grouped-query attention and a sliding window."""

from easyllm.core.json_types import JsonObject
from easyllm.models.families.family import (
    Family,
    HFConfig,
    dense_layer,
    llama_keymap,
    read_attention,
    read_glu,
    read_model,
    refuse,
    with_defaults,
    write_dense_model,
)
from easyllm.models.families.gguf_write import write_mistral
from easyllm.nn.config import ModelConfig

DEFAULTS = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Defaults of `MistralConfig` that differ from Llama's."""


def read_config(hf: HFConfig) -> ModelConfig:
    """Converts a `MistralConfig` to a `ModelConfig`."""
    hf = with_defaults(hf, DEFAULTS)
    refuse(hf, {"hidden_act": "silu"})
    mixer = read_attention(hf, window=hf.get("sliding_window"))
    return read_model(hf, family="mistral", layer=lambda _: (mixer, read_glu(hf)))


def write_config(config: ModelConfig) -> JsonObject:
    """Returns the `config.json` values of a Mistral model."""
    mixer, _ = dense_layer(config)
    return write_dense_model(config, model_type="mistral", architecture="MistralForCausalLM") | {
        "sliding_window": mixer.window,
    }


SIZES = {
    "mistral-7b": {
        "model_type": "mistral",
        "vocab_size": 32000,
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 14336,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    }
}

FAMILY = Family(
    name="mistral",
    model_types=("mistral",),
    read_config=read_config,
    write_config=write_config,
    keymap=llama_keymap,
    sizes=SIZES,
    gguf_family="llama",
    write_gguf=write_mistral,
)
