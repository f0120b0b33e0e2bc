"""The definition of a model family and the helpers that most families share.

A family maps a Hugging Face `config.json` and its tensor names to our decoder. Most families write
their configuration and name their tensors as Llama does. The functions in this module read and
write these shared parts; each family's module handles its differences.
"""

from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from easyllm.checkpoint.keymap import KeyMap, Rule, renames
from easyllm.core.errors import CheckpointError
from easyllm.core.json_types import Json, JsonMapping, JsonObject
from easyllm.models.families.gguf_layout import GGUFLayout
from easyllm.models.families.rope_config import (
    read_max_seq_len,
    read_rope,
    write_max_seq_len,
    write_rope,
)
from easyllm.nn.config import (
    AttentionConfig,
    FeedForward,
    GLUConfig,
    LayerConfig,
    Mixer,
    ModelConfig,
    RMSNormConfig,
)
from easyllm.nn.position_config import Rope

HFConfig = JsonMapping
Part = TypeVar("Part")
MAX_LAYERS = 4096
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family of models.

    Attributes:
        name: name of the family, stored in `ModelConfig.family`.
        model_types: the `model_type` values of `config.json` that it reads; it writes the first.
        read_config: converts the values of a `config.json` to a `ModelConfig`.
        write_config: converts a `ModelConfig` to the values of a `config.json`.
        keymap: returns the map from our parameter names to Hugging Face tensor names.
        sizes: `config.json` values of published models by name.
        gguf: tensor names and metadata in GGUF files; None if GGUF is not supported.
        gguf_keymap: the map to the names that `gguf` translates the file's tensors to, if they
            differ from those of Hugging Face files (where the file does not fuse tensors).
        gguf_family: the family with the layout that its models are written in, if that is another.
        write_gguf: converts the values of a `config.json` to GGUF metadata without the
            architecture in front; None if its models are not written as GGUF.
    """

    name: str
    model_types: tuple[str, ...]
    read_config: Callable[[HFConfig], ModelConfig]
    write_config: Callable[[ModelConfig], JsonObject]
    keymap: Callable[[ModelConfig], KeyMap]
    sizes: Mapping[str, JsonObject] = field(default_factory=dict)
    gguf: GGUFLayout | None = None
    gguf_keymap: Callable[[ModelConfig], KeyMap] | None = None
    gguf_family: str = ""
    write_gguf: Callable[[JsonMapping], JsonObject] | None = None


def with_defaults(config: HFConfig, defaults: HFConfig) -> HFConfig:
    """Returns `config` with missing keys set to the defaults of its `transformers` class.

    A key that is explicitly null stays null.
    """
    return ChainMap(cast("JsonObject", config), dict(defaults))


def expect_part(value: object, kind: type[Part]) -> Part:
    """Returns a model part after checking that it has the only type the family's format supports.

    Raises:
        CheckpointError: it has another type.
    """
    if not isinstance(value, kind):
        raise CheckpointError(
            f"it uses {type(value).__name__}, but the family uses {kind.__name__} in every layer"
        )
    return value


def require(config: HFConfig, key: str) -> Json:
    """Returns the value of `key`.

    Raises:
        CheckpointError: the key is missing or null.
    """
    if config.get(key) is None:
        raise CheckpointError(f"config.json has no {key!r}; copy the checkpoint's own config.json")
    return config[key]


def num_layers(config: HFConfig, key: str = "num_hidden_layers") -> int:
    """Returns the number of layers.

    Raises:
        CheckpointError: the number is missing or not in 1 to `MAX_LAYERS`. The upper bound prevents
            a damaged file from making us build millions of layers.
    """
    count = require(config, key)
    if not isinstance(count, int) or not 1 <= count <= MAX_LAYERS:
        raise CheckpointError(f"config.json sets {key}={count!r}, expected 1 to {MAX_LAYERS}")
    return count


def refuse(config: HFConfig, expected: JsonMapping) -> None:
    """Rejects options of `config.json` that change the computation and are not implemented.

    Args:
        config: the values of the `config.json`.
        expected: the only supported value of each option; a missing or null option is accepted.

    Raises:
        CheckpointError: an option has another value.
    """
    for key, value in expected.items():
        if config.get(key, value) not in (value, None):
            raise CheckpointError(
                f"config.json sets {key}={config[key]!r}, which is not implemented "
                f"(expected {value!r})"
            )


def read_attention(hf: HFConfig, **changes: Any) -> AttentionConfig:
    """Reads heads, widths and RoPE from the keys that Llama uses.

    Args:
        hf: the values of a `config.json`.
        **changes: fields of `AttentionConfig` that override what was read.
    """
    heads = require(hf, "num_attention_heads")
    head_dim = hf.get("head_dim") or require(hf, "hidden_size") // heads
    values: JsonObject = {
        "num_heads": heads,
        "num_kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
    }
    if "position" not in changes:
        values["position"] = read_rope(hf, head_dim)
    return AttentionConfig(**values | changes)


def read_glu(hf: HFConfig, **changes: Any) -> GLUConfig:
    """Reads a SwiGLU from the keys that Llama uses; `changes` override fields of `GLUConfig`."""
    values = {"intermediate_size": require(hf, "intermediate_size")}
    return GLUConfig(**values | changes)


def read_model(
    hf: HFConfig,
    *,
    family: str,
    layer: Callable[[int], tuple[Mixer, FeedForward]],
    norm_placement: str = "pre",
    **changes: Any,
) -> ModelConfig:
    """Reads a model with a Llama-style `config.json`.

    Args:
        hf: the values of the `config.json`.
        family: name of the family.
        layer: returns the mixer and the feed-forward of layer i.
        norm_placement: `pre` (pre-norm), `post` (post-norm) or `sandwich` (both), see `nn/config`.
        **changes: fields of `ModelConfig` that override what was read.
    """
    layers = []
    for number in range(num_layers(hf)):
        mixer, feed_forward = layer(number)
        layers.append(
            LayerConfig(mixer=mixer, feed_forward=feed_forward, norm_placement=norm_placement)
        )
    values: JsonObject = {
        "family": family,
        "vocab_size": require(hf, "vocab_size"),
        "hidden_size": require(hf, "hidden_size"),
        "max_seq_len": read_max_seq_len(hf, _rope_of(layers[0].mixer)),
        "layers": tuple(layers),
        "norm": RMSNormConfig(eps=hf.get("rms_norm_eps", 1e-6)),
        "tie_embeddings": bool(hf.get("tie_word_embeddings", False)),
        **read_token_ids(hf),
    }
    return ModelConfig(**values | changes)


def _rope_of(mixer: Mixer) -> Rope | None:
    return mixer.position if isinstance(mixer.position, Rope) else None


def write_model(config: ModelConfig, *, model_type: str, architecture: str) -> JsonObject:
    """Returns the values of a Llama-style `config.json`, without those of the feed-forward.

    Raises:
        CheckpointError: the model does not use softmax attention with RoPE.
    """
    mixer = expect_part(config.layers[0].mixer, AttentionConfig)
    position = expect_part(mixer.position, Rope)
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_kv_heads,
        "head_dim": mixer.head_dim,
        "max_position_embeddings": write_max_seq_len(config.max_seq_len, position),
        "rms_norm_eps": config.norm.eps,
        "tie_word_embeddings": config.tie_embeddings,
        **write_rope(position, mixer.head_dim),
        **write_token_ids(config),
    }


def dense_layer(config: ModelConfig) -> tuple[AttentionConfig, GLUConfig]:
    """Returns the mixer and the feed-forward of the first layer.

    Raises:
        CheckpointError: the layer does not consist of softmax attention and a GLU.
    """
    layer = config.layers[0]
    mixer = expect_part(layer.mixer, AttentionConfig)
    return mixer, expect_part(layer.feed_forward, GLUConfig)


def write_dense_model(config: ModelConfig, *, model_type: str, architecture: str) -> JsonObject:
    """Returns the values of a Llama-style `config.json` with a SwiGLU in every layer."""
    _, feed_forward = dense_layer(config)
    return write_model(config, model_type=model_type, architecture=architecture) | {
        "intermediate_size": feed_forward.intermediate_size,
        "hidden_act": "silu",
    }


def llama_pairs(norms: Mapping[str, str] | None = None) -> list[tuple[str, str]]:
    """Returns pairs of our parameter name and the HF tensor name of a Llama-style model.

    Args:
        norms: our and HF's names of the norms of a layer, if they differ from Llama's.
    """
    layer = "layers.{i}."
    norms = norms or {
        "mixer_norm": "input_layernorm",
        "feed_forward_norm": "post_attention_layernorm",
    }
    pairs = [
        ("embed_tokens.weight", "model.embed_tokens.weight"),
        ("norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
        *((f"{layer}{ours}.weight", f"model.{layer}{hf}.weight") for ours, hf in norms.items()),
        *(
            (f"{layer}mixer.{n}.weight", f"model.{layer}self_attn.{n}.weight")
            for n in ("q_norm", "k_norm")
        ),
    ]
    for kind in ("weight", "bias"):
        pairs += [
            (f"{layer}mixer.{p}_proj.{kind}", f"model.{layer}self_attn.{p}_proj.{kind}")
            for p in "qkvo"
        ]
        pairs += [
            (f"{layer}feed_forward.{p}_proj.{kind}", f"model.{layer}mlp.{p}_proj.{kind}")
            for p in ("gate", "up", "down")
        ]
    return pairs


def llama_keymap(
    config: ModelConfig,
    *,
    norms: Mapping[str, str] | None = None,
    more: Sequence[Rule] = (),
    pairs: Iterable[tuple[str, str]] = (),
) -> KeyMap:
    """Returns the key map of a Llama-style model.

    Args:
        config: the model configuration.
        norms: as for `llama_pairs`.
        more: rules specific to the family; they take precedence.
        pairs: name pairs specific to the family; they take precedence over Llama's.
    """
    ignored = [r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"]
    if config.tie_embeddings:
        ignored.append(r"lm_head\.weight")
    return KeyMap([*more, *renames(pairs), *renames(llama_pairs(norms))], tuple(ignored))


def read_token_ids(config: HFConfig) -> JsonObject:
    """Returns the BOS, EOS (one or several) and PAD ids as `ModelConfig` stores them."""
    eos = config.get("eos_token_id")
    ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    return {
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_ids": ids,
        "pad_token_id": config.get("pad_token_id"),
    }


def write_token_ids(config: ModelConfig) -> JsonObject:
    """Returns the BOS, EOS and PAD ids as `config.json` stores them."""
    eos: int | list[int] | None = list(config.eos_token_ids) or None
    if isinstance(eos, list) and len(eos) == 1:
        eos = eos[0]
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos,
        "pad_token_id": config.pad_token_id,
    }


def window_of_layer(hf: HFConfig, number: int, *, slides: bool) -> int | None:
    """Returns the sliding window of a layer in tokens, or None for full attention.

    Args:
        hf: the values of a `config.json`.
        number: index of the layer.
        slides: whether the layer has a window by the family's rule; used only if the file has no
            `layer_types`.

    Raises:
        CheckpointError: `layer_types` has the wrong length, or lists a type that is not
            implemented.
    """
    window, kinds = hf.get("sliding_window"), hf.get("layer_types")
    if kinds:
        if len(kinds) != num_layers(hf):
            raise CheckpointError(
                f"config.json lists {len(kinds)} layer_types for {num_layers(hf)} layers; "
                "copy the checkpoint's own config.json"
            )
        if kinds[number] not in LAYER_TYPES:
            raise CheckpointError(
                f"config.json sets layer_types[{number}]={kinds[number]!r}, which is not "
                f"implemented (expected {' or '.join(LAYER_TYPES)})"
            )
        slides = kinds[number] == "sliding_attention"
    return window if slides and window else None


def write_windows(config: ModelConfig) -> JsonObject:
    """Returns the `config.json` keys that describe which layers use sliding-window attention."""
    windows = [
        layer.mixer.window if isinstance(layer.mixer, AttentionConfig) else None
        for layer in config.layers
    ]
    width = next((w for w in windows if w is not None), None)
    return {
        "use_sliding_window": width is not None,
        "sliding_window": width,
        "layer_types": ["sliding_attention" if w else "full_attention" for w in windows],
    }
