"""Gemma 3, text alone: Gemma 2 with QK norm and without soft caps.

Five layers of six have a sliding window and RoPE of base 10,000; the sixth sees everything, with
another base and, in the larger models, with position interpolation.
"""

from easyllm.checkpoint.keymap import KeyMap
from easyllm.core.errors import CheckpointError
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.models.families.family import (
    Family,
    HFConfig,
    dense_layer,
    expect_part,
    llama_keymap,
    read_attention,
    read_glu,
    read_model,
    refuse,
    require,
    window_of_layer,
    with_defaults,
    write_model,
    write_windows,
)
from easyllm.models.families.gemma import SANDWICH
from easyllm.models.families.gemma_gguf import GGUF3, GLOBAL, LOCAL, PERIOD_3, write_gguf3
from easyllm.models.families.rope_config import read_rope, write_rope
from easyllm.nn.config import AttentionConfig, GLUConfig, ModelConfig, RMSNormConfig
from easyllm.nn.position_config import Rope

_GELU = "gelu_pytorch_tanh"
_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def read_config(hf: HFConfig) -> ModelConfig:
    """Converts a `Gemma3TextConfig` to a `ModelConfig`."""
    hf = with_defaults(hf, _DEFAULTS)
    refuse(hf, {"hidden_activation": _GELU, "use_bidirectional_attention": False})
    bias = bool(hf.get("attention_bias", False))
    norm = RMSNormConfig(eps=hf.get("rms_norm_eps", 1e-6), unit_offset=True)
    every = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or PERIOD_3
    near, far = _ropes(hf)

    def layer(number: int) -> tuple[AttentionConfig, GLUConfig]:
        window = window_of_layer(hf, number, slides=bool((number + 1) % every))
        mixer = read_attention(
            hf,
            position=near if window else far,
            window=window,
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=norm,
            scale=require(hf, "query_pre_attn_scalar") ** -0.5,
            softcap=hf.get("attn_logit_softcapping"),
        )
        return mixer, read_glu(hf, activation="gelu_tanh")

    return read_model(
        hf,
        family="gemma3",
        layer=layer,
        norm_placement="sandwich",
        norm=norm,
        max_seq_len=hf["max_position_embeddings"],
        embedding_scale=require(hf, "hidden_size") ** 0.5,
        logit_softcap=hf.get("final_logit_softcapping"),
    )


def _ropes(hf: HFConfig) -> tuple[Rope, Rope]:
    """Returns the RoPE of layers with a window, and that of the others.

    transformers 5 writes both under `rope_parameters`, transformers 4 as keys of their own.
    """
    both: JsonMapping = hf.get("rope_parameters") or {}
    width, plain = hf["head_dim"], {"max_position_embeddings": hf["max_position_embeddings"]}
    if "full_attention" in both:
        kinds = ("sliding_attention", "full_attention")
        near, far = ({"rope_parameters": both.get(kind) or {}} for kind in kinds)
    elif both:
        raise CheckpointError(
            "config.json sets rope_parameters without full_attention, which is not implemented for "
            "this family (expected full_attention and sliding_attention)"
        )
    else:
        near = {"rope_theta": hf.get("rope_local_base_freq", LOCAL)}
        far = {key: hf.get(key) for key in ("rope_theta", "rope_scaling")}
    return (
        read_rope(near | plain, width, theta=LOCAL),
        read_rope(far | plain, width, theta=GLOBAL),
    )


def write_config(config: ModelConfig) -> JsonObject:
    """Returns the `config.json` values of a Gemma 3 model, for both generations of tools."""
    first, feed_forward = dense_layer(config)
    mixers = [expect_part(layer.mixer, AttentionConfig) for layer in config.layers]
    found = {mixer.window is not None: expect_part(mixer.position, Rope) for mixer in mixers}
    near, far = found.get(True, Rope(theta=LOCAL)), found.get(False, Rope(theta=GLOBAL))
    if near.scaling is not None:
        raise CheckpointError("the RoPE of its layers with a window is scaled")
    written = write_model(config, model_type="gemma3_text", architecture="Gemma3ForCausalLM")
    written |= write_rope(far, first.head_dim) | {"rope_local_base_freq": near.theta}
    written["max_position_embeddings"] = config.max_seq_len
    scaling = written["rope_scaling"] or {"rope_type": "default"}
    written["rope_parameters"] = {
        "full_attention": scaling | {"rope_theta": far.theta},
        "sliding_attention": {"rope_type": "default", "rope_theta": near.theta},
    }
    written |= write_windows(config)
    written.pop("use_sliding_window", None)
    return written | {
        "intermediate_size": feed_forward.intermediate_size,
        "attention_bias": first.qkv_bias,
        "hidden_activation": _GELU,
        "query_pre_attn_scalar": round((first.scale or first.head_dim**-0.5) ** -2),
        "attn_logit_softcapping": first.softcap,
        "final_logit_softcapping": config.logit_softcap,
    }


def keymap(config: ModelConfig) -> KeyMap:
    """Returns Llama's key map with four norms per layer."""
    return llama_keymap(config, norms=SANDWICH)


FAMILY = Family(
    name="gemma3",
    model_types=("gemma3_text",),
    read_config=read_config,
    write_config=write_config,
    keymap=keymap,
    gguf=GGUF3,
    write_gguf=write_gguf3,
)
