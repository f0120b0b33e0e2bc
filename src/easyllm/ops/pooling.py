"""Pooling: the hidden states of each packed sequence as one vector.

T packed tokens, S sequences, D hidden size.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

SequencePooling = Literal["mean", "last", "first"]
"""Mean of the hidden states of all tokens, or that of the last or the first token (`[CLS]`)."""


def pool_states(hidden: Tensor, lengths: Sequence[int], pooling: SequencePooling) -> Tensor:
    """Returns one vector per sequence, [S, D] in at least fp32; differentiable.

    Args:
        hidden: [T, D], the hidden states of packed sequences.
        lengths: number of tokens of each sequence, each at least 1, summing to T.
        pooling: how the states of a sequence become one vector.

    Example:
        >>> pool_states(torch.tensor([[1.0], [3.0], [5.0]]), [2, 1], "mean").tolist()
        [[2.0], [5.0]]
    """
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    counts = torch.tensor(lengths, device=hidden.device)
    ends = counts.cumsum(0)
    if pooling == "last":
        return wide.index_select(0, ends - 1)
    if pooling == "first":
        return wide.index_select(0, ends - counts)
    owner = torch.arange(len(counts), device=hidden.device).repeat_interleave(counts)
    sums = wide.new_zeros(len(counts), wide.shape[1]).index_add(0, owner, wide)
    return sums / counts[:, None]


__all__ = ["SequencePooling", "pool_states"]
