"""Yi in its first layout (`model_type` `Yi`): Llama with the norms named `ln1` and `ln2`.

Later folders of the same models are of `model_type` `llama`.
"""

from easyllm.checkpoint.keymap import KeyMap
from easyllm.core.json_types import JsonObject
from easyllm.models.families.family import (
    Family,
    HFConfig,
    llama_keymap,
    read_attention,
    read_glu,
    read_model,
    refuse,
    with_defaults,
    write_dense_model,
)
from easyllm.models.families.gguf_write import write_llama
from easyllm.nn.config import ModelConfig

_DEFAULTS = {
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000000.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NORMS = {"mixer_norm": "ln1", "feed_forward_norm": "ln2"}


def read_config(hf: HFConfig) -> ModelConfig:
    """Converts a `YiConfig` to a `ModelConfig`."""
    hf = with_defaults(hf, _DEFAULTS)
    refuse(hf, {"hidden_act": "silu"})
    mixer = read_attention(hf)
    return read_model(hf, family="yi", layer=lambda _: (mixer, read_glu(hf)))


def write_config(config: ModelConfig) -> JsonObject:
    """Returns the `config.json` values of a Yi model."""
    return write_dense_model(config, model_type="Yi", architecture="YiForCausalLM")


def keymap(config: ModelConfig) -> KeyMap:
    """Returns Llama's key map with the norms' own names."""
    return llama_keymap(config, norms=_NORMS)


FAMILY = Family(
    name="yi",
    model_types=("Yi",),
    read_config=read_config,
    write_config=write_config,
    keymap=keymap,
    sizes={
        "yi-6b": {
            "model_type": "Yi",
            "vocab_size": 64000,
            "num_hidden_layers": 32,
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "intermediate_size": 11008,
        }
    },
    gguf_family="llama",
    gguf_keymap=llama_keymap,
    write_gguf=write_llama,
)
