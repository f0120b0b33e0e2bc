"""Baichuan 1 and 2: Llama with queries, keys and values in one tensor, `W_pack`.

The 13B models have ALiBi in place of RoPE, and those of Baichuan 2 an output head with rows of unit
length (Yang et al. 2023, arXiv 2309.10305, section 2).
"""

from easyllm.checkpoint.keymap import Converted, Fused, KeyMap, Rename, Rule
from easyllm.core.errors import CheckpointError
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.models.families.family import (
    Family,
    HFConfig,
    dense_layer,
    llama_keymap,
    read_attention,
    read_glu,
    read_model,
    refuse,
    require,
    with_defaults,
    write_token_ids,
)
from easyllm.models.families.gguf_layout import (
    LLAMA_NAMES,
    GGUFLayout,
    GGUFMetadata,
    half_split,
    read_llama,
)
from easyllm.models.families.gguf_write import interleave, write_llama
from easyllm.nn.config import ModelConfig
from easyllm.nn.norm_head import scaled_rows, unit_rows
from easyllm.nn.position_config import Alibi, Position, Rope

_VOCAB_2 = 125696
"""Vocabulary size of Baichuan 2, by which its own code and that of other tools recognise it."""
_LAYERS = {True: 32, False: 40}
"""Number of layers by which llama.cpp recognises the models with RoPE, and those with ALiBi.

With any other number it applies no positions at all, silently.
"""
_DEFAULTS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "rms_norm_eps": 1e-6}


def read_config(hf: HFConfig) -> ModelConfig:
    """Converts the `config.json` of a Baichuan model to a `ModelConfig`.

    A file of a 13B model gives `model_max_length` alone, one of a 7B model also
    `max_position_embeddings`: only RoPE has a table of positions.
    """
    rotary = hf.get("max_position_embeddings") is not None
    hf = with_defaults(hf, _DEFAULTS)
    refuse(hf, {"hidden_act": "silu", "rope_theta": 10000.0, "rope_scaling": None})
    position = Rope() if rotary else Alibi()
    length = hf.get("model_max_length", 4096)
    mixer = read_attention(hf, position=position)
    second = hf.get("norm_head", require(hf, "vocab_size") == _VOCAB_2 or "z_loss_weight" in hf)
    return read_model(
        hf,
        family="baichuan",
        layer=lambda _: (mixer, read_glu(hf)),
        max_seq_len=hf.get("max_position_embeddings") or length,
        normalise_head=bool(second),
    )


def write_config(config: ModelConfig) -> JsonObject:
    """Returns the `config.json` values of a Baichuan model.

    Raises:
        CheckpointError: its code has no such positions.
    """
    mixer, feed_forward = dense_layer(config)
    rotary = _is_rotary(mixer.position)
    first_7b = rotary and not config.normalise_head
    length = {"max_position_embeddings": config.max_seq_len} if rotary else {}
    return {
        "architectures": ["BaiChuanForCausalLM" if first_7b else "BaichuanForCausalLM"],
        "model_type": "baichuan",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": feed_forward.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": mixer.num_heads,
        "hidden_act": "silu",
        **length,
        "model_max_length": config.max_seq_len,
        "rms_norm_eps": config.norm.eps,
        "norm_head": config.normalise_head,
        "tie_word_embeddings": config.tie_embeddings,
        **write_token_ids(config),
    }


def _is_rotary(position: Position) -> bool:
    if position not in (Rope(), Alibi()):
        raise CheckpointError(
            f"its positions are {position!r}, but Baichuan has plain RoPE (θ 10000) or ALiBi"
        )
    return isinstance(position, Rope)


def keymap(config: ModelConfig) -> KeyMap:
    """Returns Llama's key map with queries, keys and values in one tensor."""
    mixer, _ = dense_layer(config)
    width = mixer.num_heads * mixer.head_dim
    names = tuple(f"layers.{{i}}.mixer.{part}_proj.weight" for part in "qkv")
    rules: list[Rule] = [
        Fused(names, "model.layers.{i}.self_attn.W_pack.weight", (width, width, width))
    ]
    if config.normalise_head:
        head = Rename("lm_head.weight", "lm_head.weight")
        rules.append(Converted(head, (scaled_rows,), (None,)))
    return llama_keymap(config, more=rules)


def read_gguf(metadata: GGUFMetadata) -> JsonObject:
    """Converts GGUF metadata of the architecture `baichuan`; its head is used as it is stored."""
    hf = read_llama(metadata, "baichuan")
    length = hf.pop("max_position_embeddings")
    rotary = hf["num_hidden_layers"] != _LAYERS[False]
    metadata.expect("rope.freq_base", 10000.0)
    lengths = {"model_max_length": length} | ({"max_position_embeddings": length} if rotary else {})
    return hf | lengths | {"norm_head": False}


def write_gguf(hf: JsonMapping) -> JsonObject:
    """Returns GGUF metadata.

    Raises:
        CheckpointError: llama.cpp would take it for a model with other positions.
    """
    rotary = "max_position_embeddings" in hf
    layers, expected = hf["num_hidden_layers"], _LAYERS[rotary]
    if layers != expected:
        raise CheckpointError(
            f"llama.cpp applies {'RoPE' if rotary else 'ALiBi'} to a Baichuan model of {expected} "
            f"layers only, and this one has {layers}; save it as a Hugging Face folder"
        )
    heads = hf["num_attention_heads"]
    return write_llama(
        dict(hf)
        | {
            "max_position_embeddings": hf["model_max_length"],
            "num_key_value_heads": heads,
            "rope_theta": 10000.0,
        }
    )


def _size(layers: int, hidden: int, inner: int, vocab: int) -> JsonObject:
    length = {} if layers == _LAYERS[False] else {"max_position_embeddings": 4096}
    return {
        "model_type": "baichuan",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "model_max_length": 4096,
    } | length


FAMILY = Family(
    name="baichuan",
    model_types=("baichuan",),
    read_config=read_config,
    write_config=write_config,
    keymap=keymap,
    sizes={
        "baichuan-7b": _size(32, 4096, 11008, 64000),
        "baichuan-13b": _size(40, 5120, 13696, 64000),
        "baichuan2-7b": _size(32, 4096, 11008, _VOCAB_2),
        "baichuan2-13b": _size(40, 5120, 13696, _VOCAB_2),
    },
    gguf=GGUFLayout(
        architectures=("baichuan",),
        read_config=read_gguf,
        names=LLAMA_NAMES,
        transforms=dict.fromkeys(
            ("blk.{i}.attn_q", "blk.{i}.attn_k"), half_split("num_attention_heads")
        ),
        untransforms=dict.fromkeys(
            ("blk.{i}.attn_q", "blk.{i}.attn_k"), interleave("num_attention_heads")
        ),
    ),
    gguf_keymap=lambda config: llama_keymap(
        config,
        more=[Converted(Rename("lm_head.weight", "lm_head.weight"), (None,), (unit_rows,))]
        if config.normalise_head
        else (),
    ),
    write_gguf=write_gguf,
)
