"""Gemma 1 to 3 in GGUF files, which store neither windows of layers nor the scale of scores."""

from easyllm.core.errors import CheckpointError
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.models.families.gguf_layout import (
    LLAMA_NAMES,
    QK_NORMS,
    GGUFLayout,
    GGUFMetadata,
    minus_one,
    plus_one,
    read_llama,
)
from easyllm.models.families.gguf_write import write_llama

PERIOD_3, LOCAL, GLOBAL = 6, 10000.0, 1000000.0
"""Gemma 3: one layer in this many sees everything; bases of RoPE with and without a window."""
_LAYERS_27B = 46
"""Number of layers by which llama.cpp recognises Gemma 2 27B, because its GGUF files do not store
its attention scale."""
_WINDOW = 4096
"""llama.cpp's default for files without a sliding window (its first conversions of Gemma 2)."""
_NORMS = ("output_norm", "blk.{i}.attn_norm", "blk.{i}.ffn_norm")
_MORE_NORMS = {
    "blk.{i}.post_attention_norm": "model.layers.{i}.post_attention_layernorm",
    "blk.{i}.ffn_norm": "model.layers.{i}.pre_feedforward_layernorm",
    "blk.{i}.post_ffw_norm": "model.layers.{i}.post_feedforward_layernorm",
}


def read_gguf2(metadata: GGUFMetadata) -> JsonObject:
    """Converts GGUF metadata of the architecture `gemma2`.

    Attention is scaled by the head dimension or, in the 27B model, by the hidden size divided by
    the number of heads.
    """
    hf = read_llama(metadata, "gemma2")
    wide = hf["num_hidden_layers"] == _LAYERS_27B
    return hf | {
        "sliding_window": metadata.get("attention.sliding_window", _WINDOW),
        "attn_logit_softcapping": metadata.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": metadata.get("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": hf["hidden_size"] // hf["num_attention_heads"]
        if wide
        else hf["head_dim"],
    }


def write_gguf2(hf: JsonMapping) -> JsonObject:
    """Returns GGUF metadata of Gemma 2.

    Raises:
        CheckpointError: llama.cpp computes something else for the model.
    """
    check_gguf(hf, period=2, wide=hf["num_hidden_layers"] == _LAYERS_27B)
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    return (
        write_llama(hf)
        | {"attention.sliding_window": hf["sliding_window"]}
        | {key: float(hf[key] or 0.0) for key in caps}
    )


def check_gguf(hf: JsonMapping, *, period: int, wide: bool) -> None:
    """Checks that GGUF files of Gemma, which have no keys for them, imply its windows and scale.

    Args:
        hf: the values of a `config.json`.
        period: one layer in this many, the last, has no window.
        wide: whether llama.cpp scales by the width divided by the number of heads.

    Raises:
        CheckpointError: they do not.
    """
    windows = [kind == "sliding_attention" for kind in hf["layer_types"]]
    reason = ""
    if windows != [bool((i + 1) % period) for i in range(len(windows))]:
        reason = f"windows in other layers than all but each {period}th"
    scalar = hf["hidden_size"] // hf["num_attention_heads"] if wide else hf["head_dim"]
    if hf["query_pre_attn_scalar"] != scalar:
        reason = f"query_pre_attn_scalar={hf['query_pre_attn_scalar']}, expected {scalar}"
    if hf.get("attention_bias"):
        reason = "biases of attention"
    if reason:
        raise CheckpointError(
            f"GGUF files cannot represent this model: it has {reason}; save it as a Hugging Face "
            "folder"
        )


GGUF = GGUFLayout(
    architectures=("gemma",),
    read_config=lambda metadata: read_llama(metadata, "gemma"),
    names=LLAMA_NAMES,
    transforms=dict.fromkeys(_NORMS, minus_one),
    untransforms=dict.fromkeys(_NORMS, plus_one),
)
GGUF2 = GGUFLayout(
    architectures=("gemma2",),
    read_config=read_gguf2,
    names={**LLAMA_NAMES, **_MORE_NORMS},
    transforms=dict.fromkeys((*_NORMS, *_MORE_NORMS), minus_one),
    untransforms=dict.fromkeys((*_NORMS, *_MORE_NORMS), plus_one),
)


_LAYERS_27B_3 = 62
"""Number of layers by which llama.cpp recognises Gemma 3 27B, whose attention scale differs."""


def read_gguf3(metadata: GGUFMetadata) -> JsonObject:
    """Converts GGUF metadata of the architecture `gemma3`; the windows' base is llama.cpp's."""
    hf = read_llama(metadata, "gemma3_text")
    wide = hf["num_hidden_layers"] == _LAYERS_27B_3
    per_head = hf["hidden_size"] // hf["num_attention_heads"]
    return hf | {
        "rope_theta": float(metadata.get("rope.freq_base", GLOBAL)),
        "rope_local_base_freq": float(metadata.get("rope.freq_base_swa", LOCAL)),
        "sliding_window": metadata.need("attention.sliding_window"),
        "sliding_window_pattern": PERIOD_3,
        "final_logit_softcapping": metadata.get("final_logit_softcapping") or None,
        "query_pre_attn_scalar": per_head if wide else hf["head_dim"],
    }


def write_gguf3(hf: JsonMapping) -> JsonObject:
    """Returns GGUF metadata.

    Raises:
        CheckpointError: llama.cpp computes something else for the model.
    """
    check_gguf(hf, period=PERIOD_3, wide=hf["num_hidden_layers"] == _LAYERS_27B_3)
    if hf["attn_logit_softcapping"]:
        raise CheckpointError(
            "GGUF files of Gemma 3 have no soft cap of attention scores, but this model has one; "
            "save it as a Hugging Face folder"
        )
    return write_llama(hf) | {
        "attention.sliding_window": hf["sliding_window"] or 0,
        "rope.freq_base_swa": float(hf["rope_local_base_freq"]),
        "final_logit_softcapping": float(hf["final_logit_softcapping"] or 0.0),
    }


_ONE_ADDED = ("output_norm", "blk.{i}.attn_norm", *QK_NORMS, *_MORE_NORMS)
GGUF3 = GGUFLayout(
    architectures=("gemma3",),
    read_config=read_gguf3,
    names={**LLAMA_NAMES, **QK_NORMS, **_MORE_NORMS},
    transforms=dict.fromkeys(_ONE_ADDED, minus_one),
    untransforms=dict.fromkeys(_ONE_ADDED, plus_one),
)
