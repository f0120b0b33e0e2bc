"""Shifted sparse attention (S²-Attn): attention inside groups, half of the heads shifted.

A sequence is split into groups of G tokens. Half of the heads attend inside these groups, the other
half inside groups that are shifted by G/2, so that information passes between neighbouring groups
(Chen et al. 2023, LongLoRA, arXiv 2309.12307, section 3.2). It makes fine-tuning on long texts
cheap; the model is then used with full attention.

The paper rolls tokens around the end of the sequence, which puts its last G/2 tokens into one group
with the first; here the first and the last shifted group are shorter instead, so nothing leaks.
"""

import torch
from torch import Tensor

from easyllm.ops.attention import attention
from easyllm.ops.attention_rule import AttentionRule


def shifted_attention(
    q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, lengths: tuple[int, ...], group: int
) -> Tensor:
    """Computes attention inside groups of `group` tokens, the second half of the heads shifted.

    Args:
        q: [T, H, d]; k, v: [T, K, d]; H and K even.
        rule: scale and mask, without position terms.
        lengths: number of tokens of each sequence.
        group: G, even.

    Returns:
        [T, H, d], dtype of `q`.
    """
    heads, kv = q.shape[1] // 2, k.shape[1] // 2
    halves = []
    for number, shift in enumerate((0, group // 2)):
        mine, its = (
            slice(number * heads, (number + 1) * heads),
            slice(number * kv, (number + 1) * kv),
        )
        pieces = tuple(n for length in lengths for n in group_lengths(length, group, shift))
        halves.append(attention(q[:, mine], k[:, its], v[:, its], rule, pieces))
    return torch.cat(halves, dim=1)


def group_lengths(length: int, group: int, shift: int) -> list[int]:
    """Returns the sizes of the groups of a sequence, the first of which ends at `shift`, or G.

    >>> group_lengths(10, 4, 0), group_lengths(10, 4, 2)
    ([4, 4, 2], [2, 4, 4])
    """
    first = min(length, shift)
    sizes = [first] if first else []
    return sizes + [min(group, length - start) for start in range(first, length, group)]


__all__ = ["group_lengths", "shifted_attention"]
