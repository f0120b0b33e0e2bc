"""The number of query-key pairs that attention computes."""

from typing import Literal

from easyllm.nn.config import AttentionConfig

Counting = Literal["causal", "full"]
"""`causal` counts the visible pairs, which tiled kernels compute (except at the edges of tiles);
`full` counts all n² pairs of a sequence, as for materialised scores and in published figures."""


def visible_pairs(mixer: AttentionConfig, length: int, counting: Counting) -> int:
    """Returns the number of visible pairs, or of all pairs, in a sequence of `length` tokens.

    >>> mixer = AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=2, window=4)
    >>> visible_pairs(mixer, 10, "causal"), visible_pairs(mixer, 10, "full")
    (34, 100)
    """
    if counting == "full":
        return length * length
    window = min(mixer.window or length, length)
    # tokens after the first window; 1, 2 ... `outside` keys are hidden from them
    outside = length - window
    if not mixer.causal:
        return length * length - outside * (outside + 1)
    near = window * (window + 1) // 2 + outside * window
    sinks = min(mixer.num_sinks, outside)
    return near + sinks * (sinks + 1) // 2 + (outside - sinks) * sinks


def pairs_of_heads(mixer: AttentionConfig, length: int, counting: Counting) -> int:
    """Returns the sum of `visible_pairs` over the query heads.

    A head that sees one direction of a bidirectional layer has as many pairs as a causal one.

    >>> mixer = AttentionConfig(
    ...     num_heads=2, num_kv_heads=2, head_dim=2, causal=False, directions=("backward", "both")
    ... )
    >>> pairs_of_heads(mixer, 10, "causal")
    155
    """
    pairs = visible_pairs(mixer, length, counting)
    if mixer.directions is None or mixer.causal or counting == "full":
        return mixer.num_heads * pairs
    one_way = visible_pairs(mixer.model_copy(update={"causal": True}), length, counting)
    return sum(pairs if direction == "both" else one_way for direction in mixer.directions)


def visible_keys(mixer: AttentionConfig, length: int) -> int:
    """Returns the number of keys that the last of `length` tokens sees."""
    if mixer.window is None or length <= mixer.window:
        return length
    return mixer.window + min(mixer.num_sinks, length - mixer.window)
