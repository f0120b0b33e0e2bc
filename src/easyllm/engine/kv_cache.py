"""The only owner of cached keys and values."""

from collections.abc import Sequence

import torch
from torch import Tensor

from easyllm.nn.config import ModelConfig
from easyllm.ops.attention import AttentionRule, attend_segment

FIRST_CAPACITY = 64


class SequenceCache:
    """Keys and values of one sequence, all layers; grows by doubling.

    Args:
        config: gives layers, heads and widths.
        dtype, device: of the model.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.length = 0
        self._shapes = [(m.num_kv_heads, m.head_dim) for m in (c.mixer for c in config.layers)]
        self._dtype, self._device = dtype, device
        self._capacity = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def reserve(self, length: int) -> None:
        """Makes room for `length` tokens."""
        if length <= self._capacity:
            return
        self._capacity = max(length, 2 * self._capacity, FIRST_CAPACITY)
        self.keys = [self._grown(t, shape) for t, shape in self._paired(self.keys)]
        self.values = [self._grown(t, shape) for t, shape in self._paired(self.values)]

    def _paired(self, old: list[Tensor]) -> list[tuple[Tensor | None, tuple[int, int]]]:
        return [(old[i] if old else None, shape) for i, shape in enumerate(self._shapes)]

    def _grown(self, old: Tensor | None, shape: tuple[int, int]) -> Tensor:
        new = torch.empty(self._capacity, *shape, dtype=self._dtype, device=self._device)
        if old is not None:
            new[: self.length] = old[: self.length]
        return new


class BatchCache:
    """The caches of the sequences in one forward pass; what attention talks to.

    Args:
        caches: one for each sequence, in the order of the packed tokens.
        lengths: new tokens of each.
    """

    def __init__(self, caches: Sequence[SequenceCache], lengths: Sequence[int]) -> None:
        self.caches, self.lengths = caches, list(lengths)
        for cache, length in zip(caches, lengths, strict=True):
            cache.reserve(cache.length + length)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
        """Stores `k, v: [T, K, d]` behind what each sequence has, and attends over all of it."""
        out = torch.empty_like(q)
        start = 0
        for cache, length in zip(self.caches, self.lengths, strict=True):
            new = slice(start, start + length)
            end = cache.length + length
            cache.keys[layer][cache.length : end] = k[new]
            cache.values[layer][cache.length : end] = v[new]
            out[new] = attend_segment(
                q[new], cache.keys[layer][:end], cache.values[layer][:end], rule
            )
            start += length
        return out

    def commit(self) -> None:
        """Counts the new tokens in, after the last layer."""
        for cache, length in zip(self.caches, self.lengths, strict=True):
            cache.length += length
