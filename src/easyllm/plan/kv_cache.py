"""Memory of the KV cache and of recurrent states, as `engine/kv_cache` stores them."""

import math
from dataclasses import dataclass

from easyllm.nn.config import AttentionConfig, ModelConfig
from easyllm.ops.huge_memory import FIRST_BYTES, HUGE
from easyllm.plan.parts import layers_of, mixer_of


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSize:
    """Memory of the cached sequences.

    Attributes:
        bytes_per_token: bytes of one more token while no attention window is full.
        state_bytes: bytes of the recurrent states of a sequence, independent of its length.
        total: bytes of all sequences at the given length.
    """

    bytes_per_token: int
    state_bytes: int
    total: int


def cache_size(
    config: ModelConfig, *, context: int, sequences: int = 1, itemsize: float = 2
) -> CacheSize:
    """Returns the size of the KV cache of `sequences` sequences of `context` tokens each.

    A layer stores a key and a value of [K, d] per token: 2·K·d elements. If every attention layer
    has a causal window, only the sinks and the last W tokens of the widest window are stored;
    otherwise all tokens are, because a page contains its tokens' keys and values of every layer.

    Args:
        itemsize: bytes per element: 2 for bf16 and fp16, 1 for int8, 0.5 for int4.
    """
    per_token, state = 0, 0
    for layer in layers_of(config)[-config.num_layers :]:  # an encoder has no cache
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
    """The tokens that a model with a window in every layer still reads.

    Attributes:
        window: number of most recent tokens.
        num_sinks: number of attention sinks at the start of the sequence.
    """

    window: int
    num_sinks: int


def rolling_window(config: ModelConfig) -> Rolling | None:
    """Returns the widest window and the maximum number of sinks over all attention layers.

    Tokens between the sinks and the window are never read again.

    Returns:
        None if an attention layer has no causal window.
    """
    mixers = [x.mixer for x in config.layers if isinstance(x.mixer, AttentionConfig)]
    windows = [m.window for m in mixers if m.window and m.causal]
    if not windows or len(windows) < len(mixers):
        return None
    return Rolling(window=max(windows), num_sinks=max(m.num_sinks for m in mixers))


def prefill_tokens(config: ModelConfig, *, context: int, sequences: int, step: int) -> int:
    """Returns the maximum number of tokens whose keys are stored at a time.

    With a window in every layer, a step writes all its tokens before those outside are freed.

    Args:
        context: tokens per sequence.
        sequences: number of sequences.
        step: tokens of a forward pass.
    """
    kept = _tokens_kept(config, context)
    return sequences * kept + (min(step, sequences * context) if kept < context else 0)


def huge_page_bytes(config: ModelConfig, tokens: int, itemsize: float) -> int:
    """Returns the memory that the stored keys and values of `tokens` tokens take on a CPU.

    The system supplies them in huge pages of 2 MB, except for the first 256 kB of a tensor
    (`ops.huge_memory.growing_empty`), so that a layer's few tokens take a whole page. Scales of a
    quantized cache are counted with the values.
    """
    total = 0
    for layer in layers_of(config):
        one = mixer_of(layer).cache_elements() * itemsize / 2 * tokens  # keys, or values
        pages = math.ceil(max(0.0, one - FIRST_BYTES) / HUGE)
        total += 2 * round(min(one, FIRST_BYTES) + pages * HUGE)
    return total


def _tokens_kept(config: ModelConfig, context: int) -> int:
    rolling = rolling_window(config)
    return context if rolling is None else min(context, rolling.window + rolling.num_sinks)
