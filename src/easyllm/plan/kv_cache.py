"""Memory of the cache of keys and values (and of recurrent states), as `engine/kv_cache` keeps it."""

from dataclasses import dataclass

from easyllm.nn.config import AttentionConfig, ModelConfig
from easyllm.plan.parts import layers_of, mixer_of


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

    A layer keeps a key and a value of [K, d] a token: 2·K·d elements. Where every attention layer has a causal window
    without sinks, the last W tokens of the widest are kept; otherwise all, as pages hold a token in every layer.

    Args:
        itemsize: bytes of an element: 2 for bf16 and fp16, 1 for int8, 0.5 for int4.
    """
    per_token, state = 0, 0
    for layer in layers_of(config):
        mixer = mixer_of(layer)
        per_token += mixer.cache_elements()
        state += mixer.state_bytes()
    held = per_token * _tokens_kept(config, context)
    return CacheSize(
        bytes_per_token=int(per_token * itemsize),
        state_bytes=state,
        total=sequences * (int(held * itemsize) + state),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rolling:
    """What a model with a window in every layer goes on reading: the first `num_sinks` tokens and the last `window`."""

    window: int
    num_sinks: int


def rolling_window(config: ModelConfig) -> Rolling | None:
    """The widest window, and most sinks, of a model whose attention layers all have a causal window: what is between the
    two is never read again. None for other models."""
    mixers = [x.mixer for x in config.layers if isinstance(x.mixer, AttentionConfig)]
    windows = [m.window for m in mixers if m.window and m.causal]
    if not windows or len(windows) < len(mixers):
        return None
    return Rolling(window=max(windows), num_sinks=max(m.num_sinks for m in mixers))


def _tokens_kept(config: ModelConfig, context: int) -> int:
    rolling = rolling_window(config)
    return context if rolling is None else min(context, rolling.window + rolling.num_sinks)
