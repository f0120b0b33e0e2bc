"""The only owner of cached keys, values and recurrent states.

Shapes: P pages, K key-value heads, d head_dim; T new tokens of S sequences in one pass.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from easyllm.core.device import parse_dtype
from easyllm.core.errors import ConfigError
from easyllm.engine.page_table import Copies
from easyllm.nn.config import AttentionConfig, ModelConfig
from easyllm.nn.context import RecurrentStep
from easyllm.ops.attention import AttentionRule
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
    """Keys and values of every attention layer in pages, and the states of every layer of linear attention.

    Args:
        config: gives layers, heads and widths.
        num_pages, page_size: P, and the tokens of a page.
        dtype: of keys and values, or `"int8"`, `"int4"`; attention computes in the dtype of its queries.
        device: of the model.

    Attributes:
        keys, values: a tensor [P, K, page_size, d] for each layer; None where it keeps a state instead.
        spare_page: on a GPU the number of one page more, which no sequence has: rows that fill up a batch write there.
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
            mixer = layer.mixer
            if not isinstance(mixer, AttentionConfig):
                self.keys.append(None)
                self.values.append(None)
                continue
            pages = num_pages + (self.spare_page is not None)
            shape = (pages, mixer.num_kv_heads, page_size, mixer.head_dim)
            self.keys.append(new_pages(shape, dtype, device))
            self.values.append(new_pages(shape, dtype, device))
        self._num_layers = config.num_layers
        self._states: dict[int, list[Any]] = {}

    @property
    def num_bytes(self) -> int:
        """Of all pages, used or not."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def states(self, sequence_id: int) -> list[Any]:
        """A sequence's state in each layer; None before its first token and in layers that keep keys."""
        return self._states.setdefault(sequence_id, [None] * self._num_layers)

    def copy_pages(self, copies: Copies) -> None:
        """Copies pages, destination → source, in every layer; all sources are read before any is overwritten."""
        if not copies:
            return
        for tensor in self._tensors():
            to, of = (
                torch.tensor(list(x), device=tensor.device)
                for x in zip(*copies.items(), strict=True)
            )
            tensor[to] = tensor[of]

    def _tensors(self) -> Iterator[Tensor]:
        """Everything that lies in pages, page by page along the first axis."""
        for pages in (*self.keys, *self.values):
            if isinstance(pages, QuantizedPages):
                yield from (pages.codes, pages.scales)
            elif pages is not None:
                yield pages

    def move_states(self, forks: Iterable[tuple[int, int]], dropped: Iterable[int]) -> None:
        """Gives children their parents' states (a step makes new ones, it changes none), and forgets the dropped."""
        for parent, child in forks:
            if parent in self._states:
                self._states[child] = list(self._states[parent])
        for sequence_id in dropped:
            self._states.pop(sequence_id, None)


def cache_format(wanted: str | None, usual: torch.dtype) -> torch.dtype | str:
    """What keys and values are kept as: a dtype, `int8` or `int4`; `usual` where nothing is wanted.

    Raises:
        ConfigError: there is no such format.
    """
    if wanted is None or wanted in QUANTIZED_PAGES:
        return wanted or usual
    try:
        return parse_dtype(wanted)
    except ConfigError as error:
        raise ConfigError(f"cache_{error}, or {', '.join(QUANTIZED_PAGES)}") from None


def cache_itemsize(config: ModelConfig, kept_as: torch.dtype | str) -> float:
    """Bytes of an element of the cache, scales included (of the narrowest head there is)."""
    dims = [x.mixer.head_dim for x in config.layers if isinstance(x.mixer, AttentionConfig)]
    return element_bytes(kept_as, min(dims, default=1))


class PagedStore:
    """The cache as the layers see it in one pass (the `KeyValueStore` of its context).

    Args:
        tables: the pages of each sequence, in the order of the packed tokens.
        offsets, lengths: position of the first new token of each, and how many there are.
        sequence_ids: under which states are kept.
        paged_only: whether prompts, too, attend over pages, where it would be faster over the pass's own keys: the kernel
            for pages gives a query the same bits in any pass.
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
        v: Tensor,
        rule: AttentionRule,
        prefix_lengths: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Writes `k, v: [T, K, d]` into their pages, and attends over all of each sequence's pages."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        assert keys is not None, "a layer of softmax attention keeps keys"
        assert values is not None, "and values"
        table, pages, slots = self._on(q.device)
        write_pages(keys, k, pages, slots)
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
        """Runs `step` on each sequence's new tokens from the state it left, and keeps the new one."""
        out = []
        for sequence_id, *piece in zip(
            self.sequence_ids, *(tensor.split(self.lengths) for tensor in inputs), strict=True
        ):
            states = self.cache.states(sequence_id)
            result, states[layer] = step(*piece, state=states[layer])
            out.append(result)
        return torch.cat(out)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The page table [S, max_pages] int32, and page and slot of each new token, made by the first layer."""
        if self._placed is None:
            self._placed = (
                torch.tensor(self._table, dtype=torch.int32, device=device),
                torch.tensor(self._pages, device=device),
                torch.tensor(self._slots, device=device),
            )
        return self._placed
