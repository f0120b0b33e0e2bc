"""Memory of the cache of keys and values (and of recurrent states), as `engine/kv_cache` keeps it."""

from dataclasses import dataclass

from easyllm.nn.config import AttentionConfig, LinearAttentionConfig, ModelConfig

STATE_BYTES = 4
"""Of an element of linear attention's state, which is fp32 whatever the model's dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSize:
    """What the sequences in memory take.

    Attributes:
        bytes_per_token: of a token more while no window is full.
        state_bytes: of a sequence's recurrent states, whatever its length.
        total: of all sequences at the given length.
    """

    bytes_per_token: int
    state_bytes: int
    total: int


def cache_size(
    config: ModelConfig, *, context: int, sequences: int = 1, itemsize: float = 2
) -> CacheSize:
    """The cache of `sequences` sequences of `context` tokens each.

    A layer keeps a key and a value of [K, d] a token: 2·K·d elements. A causal window W without sinks keeps the last W
    tokens; a window with sinks keeps all, as attention there reads old ones again.

    Args:
        itemsize: bytes of an element: 2 for bf16 and fp16, 1 for int8, 0.5 for int4.
    """
    per_token, held, state = 0, 0, 0
    for layer in config.layers:
        mixer = layer.mixer
        if isinstance(mixer, LinearAttentionConfig):
            features = mixer.head_dim + (mixer.features == "cosine")
            state += mixer.num_heads * features * (mixer.head_dim + 1) * STATE_BYTES
            continue
        elements = 2 * mixer.num_kv_heads * mixer.head_dim
        per_token += elements
        held += elements * _tokens_kept(mixer, context)
    return CacheSize(
        bytes_per_token=int(per_token * itemsize),
        state_bytes=state,
        total=sequences * (int(held * itemsize) + state),
    )


def _tokens_kept(mixer: AttentionConfig, context: int) -> int:
    if mixer.window is None or not mixer.causal or mixer.num_sinks:
        return context
    return min(context, mixer.window)
