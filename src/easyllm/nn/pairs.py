"""How many pairs of a query and a key attention multiplies."""

from typing import Literal

from easyllm.nn.config import AttentionConfig

Counting = Literal["causal", "full"]
"""`causal` counts the pairs a mask lets through, as tiled kernels do but for the edges of tiles; `full` counts all
n² of a sequence, as products written out do and as published figures count."""


def visible_pairs(mixer: AttentionConfig, length: int, counting: Counting) -> int:
    """Pairs of a sequence of `length` tokens: those the mask lets through, or all.

    >>> mixer = AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=2, window=4)
    >>> visible_pairs(mixer, 10, "causal"), visible_pairs(mixer, 10, "full")
    (34, 100)
    """
    if counting == "full":
        return length * length
    window = min(mixer.window or length, length)
    outside = (
        length - window
    )  # tokens behind the first window, 1, 2 ... `outside` keys of which are hidden
    if not mixer.causal:
        return length * length - outside * (outside + 1)
    near = window * (window + 1) // 2 + outside * window
    sinks = min(mixer.num_sinks, outside)
    return near + sinks * (sinks + 1) // 2 + (outside - sinks) * sinks


def visible_keys(mixer: AttentionConfig, length: int) -> int:
    """Keys the last of `length` tokens sees."""
    if mixer.window is None or length <= mixer.window:
        return length
    return mixer.window + min(mixer.num_sinks, length - mixer.window)
