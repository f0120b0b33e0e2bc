"""GPT-2: learned positions, LayerNorm and a plain MLP.

On disk, q, k and v are fused in one tensor and the weight matrices of all layers are transposed.
"""

from torch import Tensor

from easyllm.checkpoint.keymap import Fused, KeyMap, Rename, Rule, renames
from easyllm.core.json_types import JsonObject
from easyllm.models.families.family import (
    Family,
    HFConfig,
    expect_part,
    num_layers,
    read_token_ids,
    refuse,
    require,
    with_defaults,
    write_token_ids,
)
from easyllm.models.families.gguf_layout import GGUFLayout, GGUFMetadata
from easyllm.nn.config import AttentionConfig, LayerConfig, LayerNormConfig, MLPConfig, ModelConfig
from easyllm.nn.position_config import Learned, NoPosition


def read_config(hf: HFConfig) -> ModelConfig:
    """Converts a `GPT2Config` to a `ModelConfig`."""
    hf = with_defaults(hf, {"bos_token_id": 50256, "eos_token_id": 50256})
    refuse(hf, {"activation_function": "gelu_new", "scale_attn_weights": True})
    refuse(hf, {"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False})
    hidden, heads = require(hf, "n_embd"), require(hf, "n_head")
    shape = {"num_heads": heads, "num_kv_heads": heads, "head_dim": hidden // heads}
    mixer = AttentionConfig(**shape, position=NoPosition(), qkv_bias=True, out_bias=True)
    inner = hf.get("n_inner") or 4 * hidden
    feed_forward = MLPConfig(intermediate_size=inner, activation="gelu_tanh")
    return ModelConfig(
        family="gpt2",
        vocab_size=require(hf, "vocab_size"),
        hidden_size=hidden,
        max_seq_len=hf.get("n_positions", 1024),
        layers=(LayerConfig(mixer=mixer, feed_forward=feed_forward),) * num_layers(hf, "n_layer"),
        norm=LayerNormConfig(eps=hf.get("layer_norm_epsilon", 1e-5)),
        embedding_position=Learned(),
        tie_embeddings=bool(hf.get("tie_word_embeddings", True)),
        **read_token_ids(hf),
    )


def write_config(config: ModelConfig) -> JsonObject:
    """Returns the `config.json` values of a GPT-2 model."""
    mixer = expect_part(config.layers[0].mixer, AttentionConfig)
    mlp = expect_part(config.layers[0].feed_forward, MLPConfig)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": mixer.num_heads,
        "n_inner": mlp.intermediate_size,
        "n_positions": config.max_seq_len,
        "layer_norm_epsilon": config.norm.eps,
        "activation_function": "gelu_new",
        "tie_word_embeddings": config.tie_embeddings,
        **write_token_ids(config),
    }


def keymap(config: ModelConfig) -> KeyMap:
    """Returns the key map: [in, out] matrices (HF's Conv1D), with q, k and v fused in `c_attn`."""
    ours, theirs = "layers.{i}.", "transformer.h.{i}."
    rules: list[Rule] = []
    for kind in ("weight", "bias"):
        matrix = kind == "weight"  # matrices are transposed on disk, biases are not
        qkv = tuple(f"{ours}mixer.{p}_proj.{kind}" for p in "qkv")
        rules.append(Fused(qkv, f"{theirs}attn.c_attn.{kind}", (config.hidden_size,) * 3, matrix))
        rules += [
            Rename(f"{ours}{a}.{kind}", f"{theirs}{b}.{kind}", matrix) for a, b in _LINEARS.items()
        ]
        rules += renames((f"{ours}{a}.{kind}", f"{theirs}{b}.{kind}") for a, b in _NORMS.items())
        rules.append(Rename(f"norm.{kind}", f"transformer.ln_f.{kind}"))
    rules += renames(_OUTSIDE.items())
    tied = (r"lm_head\.weight",) if config.tie_embeddings else ()
    return KeyMap(rules, (r"transformer\.h\.\d+\.attn\.(masked_)?bias", *tied))


_LINEARS = {"mixer.o_proj": "attn.c_proj"}
_LINEARS |= {"feed_forward.up_proj": "mlp.c_fc", "feed_forward.down_proj": "mlp.c_proj"}
_NORMS = {"mixer_norm": "ln_1", "feed_forward_norm": "ln_2"}
_OUTSIDE = {
    "embed_tokens.weight": "transformer.wte.weight",
    "embedding_position.weight": "transformer.wpe.weight",
    "lm_head.weight": "lm_head.weight",
}


def _size(
    layers: int, hidden: int, heads: int, positions: int = 1024, vocab: int = 50257
) -> JsonObject:
    sizes = {"n_layer": layers, "n_embd": hidden, "n_head": heads, "n_positions": positions}
    return {"model_type": "gpt2", "vocab_size": vocab} | sizes


_MEGATRON = (
    *(("1.7b", 24, 2304, 24), ("3.6b", 30, 3072, 32), ("7.5b", 36, 4096, 32)),
    *(("18b", 40, 6144, 48), ("22b", 48, 6144, 64), ("39b", 48, 8192, 64), ("76b", 60, 10240, 80)),
    *(("145b", 80, 12288, 96), ("175b", 96, 12288, 96), ("310b", 96, 16384, 128)),
    *(("530b", 105, 20480, 128), ("1t", 128, 25600, 160)),
)
"""Layers, width and heads of the models of arXiv 2104.04473, table 1, and 2205.05198, table 3."""
SIZES = {
    "gpt2": _size(12, 768, 12),
    "gpt2-medium": _size(24, 1024, 16),
    "gpt2-large": _size(36, 1280, 20),
    "gpt2-xl": _size(48, 1600, 25),
    "gpt3-175b": _size(96, 12288, 96, positions=2048),
    **{
        f"megatron-{name}": _size(layers, hidden, heads, positions=2048, vocab=51200)
        for name, layers, hidden, heads in _MEGATRON
    },
}


def read_gguf(metadata: GGUFMetadata) -> JsonObject:
    """Converts GGUF metadata of the architecture `gpt2`."""
    return {
        "model_type": "gpt2",
        "n_embd": metadata.need("embedding_length"),
        "n_layer": metadata.need("block_count"),
        "n_head": metadata.need("attention.head_count"),
        "n_inner": metadata.need("feed_forward_length"),
        "n_positions": metadata.need("context_length"),
        "layer_norm_epsilon": metadata.need("attention.layer_norm_epsilon"),
        "tie_word_embeddings": "output.weight" not in metadata.tensors,
    }


def _transpose_matrix(tensor: Tensor, _config: HFConfig) -> Tensor:
    """Transposes a weight from the file's [out, in] to the [in, out] of HF's Conv1D, not a bias."""
    return tensor.T if tensor.dim() == 2 else tensor


_BLOCK = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
GGUF = GGUFLayout(
    architectures=("gpt2",),
    read_config=read_gguf,
    names={
        "token_embd": "transformer.wte",
        "position_embd": "transformer.wpe",
        "output_norm": "transformer.ln_f",
        "output": "lm_head",
        **{f"blk.{{i}}.{a}": f"transformer.h.{{i}}.{b}" for a, b in _BLOCK.items()},
    },
    transforms={f"blk.{{i}}.{name}": _transpose_matrix for name in _BLOCK if "norm" not in name},
    ignored=frozenset(),
)
FAMILY = Family(
    name="gpt2",
    model_types=("gpt2",),
    read_config=read_config,
    write_config=write_config,
    keymap=keymap,
    sizes=SIZES,
    gguf=GGUF,
)
