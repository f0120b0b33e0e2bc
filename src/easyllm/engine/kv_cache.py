"""The paged KV cache: sole owner of cached keys, values and recurrent states.

Shapes: P pages, K key-value heads, d head_dim; T new tokens of S sequences in one pass.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from easyllm.core.device import parse_dtype
from easyllm.core.errors import ConfigError
from easyllm.engine.page_table import Copies
from easyllm.nn.config import AttentionConfig, LatentAttentionConfig, ModelConfig
from easyllm.nn.context import RecurrentStep
from easyllm.ops.attention_rule import AttentionRule
from easyllm.ops.paged_attention import (
    QUANTIZED_PAGES,
    Pages,
    QuantizedPages,
    element_bytes,
    new_pages,
    paged_attention,
    write_pages,
)


class KVCache:
    """Pages of keys and values for softmax attention; recurrent states for linear attention.

    Args:
        config: model configuration, for the number of layers, heads and head_dim.
        num_pages: number of pages P.
        page_size: tokens per page.
        dtype: dtype of keys and values, or `"int8"`, `"int4"`; attention computes in the dtype of
            its queries.
        device: device of the model.

    Attributes:
        keys, values: pages [P, K, page_size, d] for each layer; None for layers with a recurrent
            state. Latent attention has one head of latent vectors, which are keys and values: its
            `values` are None.
        spare_page: on a GPU, the number of an extra page that no sequence uses, to which padding
            rows of a batch write; None otherwise.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype | str,
        device: torch.device,
    ) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self.spare_page = num_pages if device.type == "cuda" else None
        self.keys: list[Pages | None] = []
        self.values: list[Pages | None] = []
        for layer in config.layers:
            mixer, keys, values = layer.mixer, None, None
            pages = num_pages + (self.spare_page is not None)
            if config.encoder is not None:
                pass  # keys and values are states of sequences (`nn/encoder_decoder`)
            elif isinstance(mixer, AttentionConfig):
                shape = (pages, mixer.num_kv_heads, page_size, mixer.head_dim)
                keys, values = (new_pages(shape, dtype, device) for _ in "kv")
            elif isinstance(mixer, LatentAttentionConfig):
                keys = new_pages((pages, 1, page_size, mixer.cache_dim), dtype, device)
            self.keys.append(keys)
            self.values.append(values)
        self._num_layers = config.num_layers
        self._states: dict[int, list[Any]] = {}

    @property
    def num_bytes(self) -> int:
        """Size in bytes of all pages, used or not."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def states(self, sequence_id: int) -> list[Any]:
        """Returns a sequence's recurrent state for each layer.

        An entry is None before the first token, and for layers of softmax attention.
        """
        return self._states.setdefault(sequence_id, [None] * self._num_layers)

    def copy_pages(self, copies: Copies) -> None:
        """Copies pages in every layer; all sources are read before any page is overwritten.

        Args:
            copies: destination → source.
        """
        if not copies:
            return
        for tensor in self._tensors():
            to, of = (
                torch.tensor(list(x), device=tensor.device)
                for x in zip(*copies.items(), strict=True)
            )
            tensor[to] = tensor[of]

    def _tensors(self) -> Iterator[Tensor]:
        """Yields all tensors stored in pages; the first axis of each is the page number."""
        for pages in (*self.keys, *self.values):
            if isinstance(pages, QuantizedPages):
                yield from (pages.codes, pages.scales)
            elif pages is not None:
                yield pages

    def move_states(self, forks: Iterable[tuple[int, int]], dropped: Iterable[int]) -> None:
        """Copies recurrent states from parents to children, then deletes the dropped sequences'.

        The copies are shallow: a step creates new states and never modifies one in place.

        Args:
            forks: (parent, child) sequence ids.
            dropped: ids of the sequences whose states are deleted.
        """
        for parent, child in forks:
            if parent in self._states:
                self._states[child] = list(self._states[parent])
        for sequence_id in dropped:
            self._states.pop(sequence_id, None)


def cache_format(wanted: str | None, usual: torch.dtype) -> torch.dtype | str:
    """Returns the storage format of keys and values: a dtype, `int8` or `int4`.

    Args:
        wanted: the name of the format, or None for the default.
        usual: the default dtype.

    Raises:
        ConfigError: the format is unknown.
    """
    if wanted is None or wanted in QUANTIZED_PAGES:
        return wanted or usual
    try:
        return parse_dtype(wanted)
    except ConfigError as error:
        raise ConfigError(f"cache_{error}, or {', '.join(QUANTIZED_PAGES)}") from None


def cache_itemsize(config: ModelConfig, kept_as: torch.dtype | str) -> float:
    """Returns the bytes per cache element, including scales (for the smallest head_dim)."""
    mixers = [layer.mixer for layer in config.layers]
    dims = [m.head_dim for m in mixers if isinstance(m, AttentionConfig)]
    dims += [m.cache_dim for m in mixers if isinstance(m, LatentAttentionConfig)]
    return element_bytes(kept_as, min(dims, default=1))


class PagedStore:
    """The cache as the layers access it in one forward pass: the pass's `KeyValueStore`.

    Args:
        cache: the cache.
        tables: the pages of each sequence, in the order of the packed tokens.
        offsets: position of the first new token of each sequence.
        lengths: number of new tokens of each sequence.
        sequence_ids: keys under which recurrent states are stored.
        paged_only: whether prompts also attend over the pages. Attending over the keys of the pass
            would be faster, but the paged kernel is batch-invariant: it gives a query bitwise
            identical results in any pass.
    """

    def __init__(
        self,
        cache: KVCache,
        *,
        tables: Sequence[Sequence[int]],
        offsets: Sequence[int],
        lengths: Sequence[int],
        sequence_ids: Sequence[int],
        paged_only: bool = False,
    ) -> None:
        self.paged_only = paged_only
        self.cache, self.lengths, self.sequence_ids = cache, tuple(lengths), sequence_ids
        self.key_lengths = tuple(o + n for o, n in zip(offsets, lengths, strict=True))
        size = cache.page_size
        pages: list[int] = []
        slots: list[int] = []
        for table, start, end in zip(tables, offsets, self.key_lengths, strict=True):
            pages.extend(table[position // size] for position in range(start, end))
            slots.extend(position % size for position in range(start, end))
        widest = max(len(table) for table in tables)
        self._table = [[*table, *[0] * (widest - len(table))] for table in tables]
        self._slots, self._pages = slots, pages
        self._placed: tuple[Tensor, Tensor, Tensor] | None = None

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        rule: AttentionRule,
        prefix_lengths: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Writes `k, v: [T, K, d]` into their pages, and attends over each sequence's pages."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        assert keys is not None, "a layer of softmax attention has pages of keys"
        assert (values is None) == (v is None), "a layer has values of its own, or none"
        table, pages, slots = self._on(q.device)
        write_pages(keys, k, pages, slots)
        if v is None or values is None:
            v, values = k, keys
        else:
            write_pages(values, v, pages, slots)
        pages_only = self.paged_only or not isinstance(keys, Tensor) or keys.dtype != k.dtype
        return paged_attention(
            q,
            keys,
            values,
            table,
            self.lengths,
            self.key_lengths,
            rule,
            prefix_lengths,
            new=None if pages_only else (k, v),
        )

    def recur(self, layer: int, step: RecurrentStep, *inputs: Tensor) -> Tensor:
        """Runs `step` on each sequence's new tokens from its stored state; stores the new state."""
        out = []
        for sequence_id, *piece in zip(
            self.sequence_ids, *(tensor.split(self.lengths) for tensor in inputs), strict=True
        ):
            states = self.cache.states(sequence_id)
            result, states[layer] = step(*piece, state=states[layer])
            out.append(result)
        return torch.cat(out)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the page table [S, max_pages] int32, and page and slot of each new token.

        The tensors are created by the first layer and reused by the others.
        """
        if self._placed is None:
            self._placed = (
                torch.tensor(self._table, dtype=torch.int32, device=device),
                torch.tensor(self._pages, device=device),
                torch.tensor(self._slots, device=device),
            )
        return self._placed
