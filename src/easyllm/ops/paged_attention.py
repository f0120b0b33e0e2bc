"""Attention over keys and values that lie in pages (Kwon et al. 2023, arXiv 2309.06180, section 4.1).

Shapes: T new tokens of S sequences, H query heads, K key-value heads, d head_dim, P pages.

Key j of sequence s lies in page `page_table[s, j // page_size]`, slot `j % page_size`. The new tokens are the last of each
sequence, and their keys are already in their pages.
"""

import torch
from torch import Tensor

from easyllm.ops.attention import AttentionRule, attend_segment


def paged_attention(
    q: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    rule: AttentionRule,
    prefix_lengths: tuple[int, ...] | None = None,
) -> Tensor:
    """Attention of each sequence's new tokens to all its keys.

    Args:
        q: [T, H, d] queries of the new tokens, sequences end to end.
        key_pages, value_pages: [P, K, page_size, d]; in another dtype than `q` they are converted.
        page_table: [S, max_pages] int32; entries behind a sequence's last key, and of pages wholly before the window of
            a causal rule without sinks, may be any page and are not read.
        lengths: new tokens of each sequence, summing to T.
        key_lengths: all tokens of each, the new ones included.
        rule: scale, mask, positions.
        prefix_lengths: first tokens of each that see each other both ways; a prefix lies whole in the pass that begins
            its sequence.

    Returns:
        [T, H, d], dtype of `q`.
    """
    prefixes = prefix_lengths or (0,) * len(lengths)
    out = []
    for row, (queries, total, prefix) in enumerate(
        zip(q.split(lengths), key_lengths, prefixes, strict=True)
    ):
        new = len(queries)
        assert not 0 < total - new < prefix, "a prefix lies whole in its sequence's first pass"
        page_size = key_pages.shape[2]
        first = _first_visible(rule, total - new) // page_size
        pages = page_table[row, first : -(-total // page_size)]
        keys, values = (
            _gather(x, pages, total - first * page_size, q) for x in (key_pages, value_pages)
        )
        positions = torch.arange(first * page_size, total, device=q.device) if first else None
        out.append(
            attend_segment(queries, keys, values, rule, key_positions=positions, prefix=prefix)
        )
    return out[0] if len(out) == 1 else torch.cat(out)


def _first_visible(rule: AttentionRule, position: int) -> int:
    """The first key that a query at `position` or behind it may see."""
    if rule.window is None or not rule.causal or rule.num_sinks:
        return 0
    return max(0, position - rule.window + 1)


def _gather(stored: Tensor, pages: Tensor, length: int, q: Tensor) -> Tensor:
    """The first `length` tokens [length, K, d] of `pages`, in the dtype of the queries."""
    found = stored.index_select(0, pages)  # [n, K, page_size, d]
    return found.transpose(1, 2).flatten(0, 1)[:length].to(q.dtype)
