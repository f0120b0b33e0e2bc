"""The only owner of cached keys, values and recurrent states."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from easyllm.nn.config import AttentionConfig, LinearAttentionConfig, ModelConfig
from easyllm.ops.attention import AttentionRule, RecurrentStep, attend_segment

FIRST_CAPACITY = 64


class GrowingKeys:
    """Keys and values of one sequence in one layer; room grows by doubling."""

    def __init__(self, config: AttentionConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.length = 0
        shape = (FIRST_CAPACITY, config.num_kv_heads, config.head_dim)
        self._keys = torch.empty(shape, dtype=dtype, device=device)
        self._values = torch.empty_like(self._keys)

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, None]:
        """Appends `k, v: [T, K, d]`; returns all keys and values (their positions are 0, 1, 2 ...)."""
        end = self.length + len(k)
        if end > len(self._keys):
            self._keys, self._values = (self._grown(t, end) for t in (self._keys, self._values))
        self._keys[self.length : end] = k
        self._values[self.length : end] = v
        self.length = end
        return self._keys[:end], self._values[:end], None

    def _grown(self, old: Tensor, least: int) -> Tensor:
        new = old.new_empty(max(least, 2 * len(old)), *old.shape[1:])
        new[: self.length] = old[: self.length]
        return new


class RollingKeys:
    """The same for a layer with a window of W: the key of position i lies in slot i mod W, over that of i - W
    (Jiang et al. 2023, arXiv 2310.06825, section 2)."""

    def __init__(
        self, config: AttentionConfig, window: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.length, self.window = 0, window
        shape = (window, config.num_kv_heads, config.head_dim)
        self._keys = torch.empty(shape, dtype=dtype, device=device)
        self._values = torch.empty_like(self._keys)

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Takes in `k, v: [T, K, d]`; returns what the new tokens may see: the window before them and
        themselves, in order, with their positions."""
        first = max(0, self.length - self.window)
        end = self.length + len(k)
        old = torch.arange(first, self.length, device=k.device)
        slots = old % self.window
        keys = torch.cat([self._keys[slots], k])
        values = torch.cat([self._values[slots], v])
        kept = torch.arange(max(self.length, end - self.window), end, device=k.device)
        self._keys[kept % self.window] = k[-len(kept) :]
        self._values[kept % self.window] = v[-len(kept) :]
        self.length = end
        return keys, values, torch.arange(first, end, device=k.device)


class SequenceCache:
    """What the layers remember of one sequence.

    Args:
        config: gives layers, heads, widths and windows.
        dtype, device: of the model.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.length = 0
        self.keys: list[GrowingKeys | RollingKeys | None] = []
        self.states: list[Any] = [None] * config.num_layers
        for layer in config.layers:
            mixer = layer.mixer
            if isinstance(mixer, LinearAttentionConfig):
                self.keys.append(None)
            elif mixer.window is not None and mixer.causal and not mixer.num_sinks:
                self.keys.append(RollingKeys(mixer, mixer.window, dtype, device))
            else:
                self.keys.append(GrowingKeys(mixer, dtype, device))


class BatchCache:
    """The caches of the sequences in one forward pass; what attention talks to.

    Args:
        caches: one for each sequence, in the order of the packed tokens.
        lengths: new tokens of each.
    """

    def __init__(self, caches: Sequence[SequenceCache], lengths: Sequence[int]) -> None:
        self.caches, self.lengths = caches, list(lengths)

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rule: AttentionRule,
        prefix_lengths: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Stores `k, v: [T, K, d]` behind what each sequence has, and attends over all of it."""
        parts = zip(
            self.caches,
            q.split(self.lengths),
            k.split(self.lengths),
            v.split(self.lengths),
            prefix_lengths or (0,) * len(self.lengths),
            strict=True,
        )
        out = []
        for cache, query, key, value, prefix in parts:
            store = cache.keys[layer]
            assert store is not None, "a layer of softmax attention keeps keys"
            assert not 0 < store.length < prefix, "a prefix lies whole in its sequence's first pass"
            keys, values, positions = store.extend(key, value)
            out.append(
                attend_segment(query, keys, values, rule, key_positions=positions, prefix=prefix)
            )
        return torch.cat(out)

    def recur(self, layer: int, step: RecurrentStep, *inputs: Tensor) -> Tensor:
        """Runs `step` on each sequence's new tokens from the state it left, and keeps the new one."""
        out = []
        for cache, *piece in zip(
            self.caches, *(tensor.split(self.lengths) for tensor in inputs), strict=True
        ):
            result, cache.states[layer] = step(*piece, state=cache.states[layer])
            out.append(result)
        return torch.cat(out)

    def commit(self) -> None:
        """Counts the new tokens in, after the last layer."""
        for cache, length in zip(self.caches, self.lengths, strict=True):
            cache.length += length
