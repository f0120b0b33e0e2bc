"""T5, and its encoder alone: relative positions whose table the layers of a stack share.

Version 1.0 (Raffel et al. 2019, arXiv 1910.10683) has ReLU feed-forwards and a tied head, whose
input is scaled by 1/√D; version 1.1 (and Flan-T5) has GEGLU and a separate head. In both,
scores are not scaled, and no linear has a bias.
"""

from easyllm.core.errors import CheckpointError
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
from easyllm.models.families.t5_names import keymap
from easyllm.nn.config import (
    AttentionConfig,
    EncoderConfig,
    FeedForward,
    GLUConfig,
    LayerConfig,
    MLPConfig,
    ModelConfig,
    RMSNormConfig,
)
from easyllm.nn.position_config import T5Bias

ENCODER_ALONE = "T5EncoderModel"
_DEFAULTS = {
    "d_kv": 64,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
_PLAIN, _GATED = "relu", "gated-gelu"


def read_config(hf: HFConfig) -> ModelConfig:
    """Converts a `T5Config` to a `ModelConfig`.

    A folder whose `architectures` is `T5EncoderModel` is the encoder: a model without a head of its
    own whose tokens see each other in both directions.
    """
    hf = with_defaults(hf, _DEFAULTS)
    alone = ENCODER_ALONE in (hf.get("architectures") or ())
    refuse(hf, {} if alone else {"is_encoder_decoder": True})
    hidden = require(hf, "d_model")
    shared = {
        "family": "t5",
        "vocab_size": require(hf, "vocab_size"),
        "hidden_size": hidden,
        "max_seq_len": hf.get("n_positions") or 512,
        "norm": RMSNormConfig(eps=hf["layer_norm_epsilon"]),
        **read_token_ids(hf),
    }
    depth = num_layers(hf, "num_layers")
    stack = (_layer(hf, causal=False),) * depth
    if alone:
        return ModelConfig(**shared, layers=stack, tie_embeddings=True)
    # transformers 5 writes that a head is tied even if it is not, and has a key for the scale
    tied = False not in (hf["tie_word_embeddings"], hf.get("scale_decoder_outputs"))
    start = hf.get("decoder_start_token_id")
    deep = hf.get("num_decoder_layers") or depth
    return ModelConfig(
        **shared,
        layers=(_layer(hf, causal=True),) * num_layers({"n": deep}, "n"),
        encoder=EncoderConfig(
            layers=stack,
            start_token_id=hf["pad_token_id"] if start is None else start,
            hidden_scale=hidden**-0.5 if tied else 1.0,
        ),
        prompt_mask="prefix_before_last",
        tie_embeddings=tied,
    )


def _layer(hf: HFConfig, *, causal: bool) -> LayerConfig:
    kind, inner = hf["feed_forward_proj"], require(hf, "d_ff")
    feed_forward: FeedForward
    if kind == _GATED:
        feed_forward = GLUConfig(intermediate_size=inner, activation="gelu_tanh")
    elif kind == _PLAIN:
        feed_forward = MLPConfig(intermediate_size=inner, activation="relu", bias=False)
    else:
        raise CheckpointError(
            f"config.json sets feed_forward_proj={kind!r}, which is not implemented (expected "
            f"{_PLAIN!r} or {_GATED!r})"
        )
    position = T5Bias(
        num_buckets=hf["relative_attention_num_buckets"],
        max_distance=hf["relative_attention_max_distance"],
        shared=True,
    )
    heads = hf["num_heads"]
    return LayerConfig(
        mixer=AttentionConfig(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=hf["d_kv"],
            position=position,
            scale=1.0,
            causal=causal,
        ),
        feed_forward=feed_forward,
    )


def write_config(config: ModelConfig) -> JsonObject:
    """Returns the `config.json` values of a T5 model or encoder."""
    encoder = config.encoder
    first = config.layers[0] if encoder is None else encoder.layers[0]
    mixer = expect_part(first.mixer, AttentionConfig)
    position = expect_part(mixer.position, T5Bias)
    wide = first.feed_forward
    gated = isinstance(wide, GLUConfig)
    if not isinstance(wide, GLUConfig | MLPConfig):
        raise CheckpointError("it has experts, which T5 has not")
    written: JsonObject = {
        "architectures": [ENCODER_ALONE if encoder is None else "T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": encoder is not None,
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "d_kv": mixer.head_dim,
        "d_ff": wide.intermediate_size,
        "num_layers": config.num_layers if encoder is None else len(encoder.layers),
        "num_heads": mixer.num_heads,
        "n_positions": config.max_seq_len,
        "relative_attention_num_buckets": position.num_buckets,
        "relative_attention_max_distance": position.max_distance,
        "layer_norm_epsilon": config.norm.eps,
        "feed_forward_proj": _GATED if gated else _PLAIN,
        "tie_word_embeddings": config.tie_embeddings,
        **write_token_ids(config),
    }
    if encoder is not None:
        written["num_decoder_layers"] = config.num_layers
        written["decoder_start_token_id"] = encoder.start_token_id
    return written


def _size(hidden: int, inner: int, layers: int, heads: int) -> JsonObject:
    return {
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": hidden,
        "d_ff": inner,
        "num_layers": layers,
        "num_heads": heads,
    }


FAMILY = Family(
    name="t5",
    model_types=("t5",),
    read_config=read_config,
    write_config=write_config,
    keymap=keymap,
    sizes={
        "t5-small": _size(512, 2048, 6, 8),
        "t5-base": _size(768, 3072, 12, 12),
        "flan-t5-small": _size(512, 1024, 8, 6)
        | {"feed_forward_proj": _GATED, "tie_word_embeddings": False},
    },
)
