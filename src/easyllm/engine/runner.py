"""Runs one forward pass on the paged KV cache: a planned `Step` in, rows of logits out."""

from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from easyllm.engine.compiled_step import CompiledStep
from easyllm.engine.graph_step import GraphStep
from easyllm.engine.kv_cache import KVCache, PagedStore
from easyllm.engine.step import ScheduledChunk, Step
from easyllm.nn.context import AdapterRows, ForwardContext, block_position_rows
from easyllm.nn.decoder import Decoder


class Runner(Protocol):
    """Computes the forward pass of a step.

    The tests implement a runner whose tokens are hashes of the pages that it reads.
    """

    def run(self, step: Step) -> Tensor:
        """Returns logits [N, V] of the rows that the pieces request (`num_logit_rows`)."""


class SingleCallStep(Protocol):
    """A decoding step in a single call: `CompiledStep` on a CPU, `GraphStep` on a GPU.

    Attributes:
        max_rows: maximum number of rows of a step.
    """

    max_rows: int

    def supports_adapters(self, names: Collection[str]) -> bool:
        """Whether rows may use these adapters (`""` is the base model, or an unnamed adapter)."""

    def bind(self) -> None:
        """Discards everything derived from the weights; must be called when they have changed."""

    def run(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        page_table: Tensor,
        key_lengths: Sequence[int],
        adapters: Sequence[str] = (),
    ) -> Tensor:
        """Decodes one token for each of S rows; returns the logits [S, V] after it.

        `adapters` has the name of each row's adapter, if the model has any.
        """


class DecoderRunner:
    """Runs the training decoder on a paged KV cache.

    For common architectures, decode-only steps run as a single call: into C on a CPU
    (`CompiledStep`), or as the replay of a CUDA graph on a GPU (`GraphStep`).

    Args:
        model: the model, in inference mode.
        cache: its keys, values and recurrent states.
        compiled: whether such single-call steps may be used.
        deterministic: whether results must be batch-invariant, with the bits of the decoder's
            forward pass in deterministic mode.
    """

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        *,
        compiled: bool = True,
        deterministic: bool = False,
    ) -> None:
        self.model, self.cache, self.deterministic = model, cache, deterministic
        self._compiled, self._adapter_changes = compiled, model.adapter_changes
        self.fast_step = self._build_fast_step() if compiled else None

    def _build_fast_step(self) -> SingleCallStep | None:
        model, cache = self.model, self.cache
        keys = [pages for pages in cache.keys if pages is not None]
        values = [pages for pages in cache.values if pages is not None]
        if not self.deterministic and GraphStep.unsupported_reason(model, cache) is None:
            return GraphStep(model, cache)
        reason = CompiledStep.unsupported_reason(
            model, (keys, values), deterministic=self.deterministic
        )
        if reason is not None:
            return None
        return CompiledStep(model, keys, values, deterministic=self.deterministic)

    def weights_changed(self) -> None:
        """Discards everything derived from the weights; must be called when they have changed.

        A single-call step is dropped if it no longer supports the model, and built if it does now,
        because adapters were attached or removed.
        """
        self._adapter_changes = self.model.adapter_changes
        reason = None
        if isinstance(self.fast_step, CompiledStep):
            reason = CompiledStep.unsupported_reason(self.model, deterministic=self.deterministic)
        elif isinstance(self.fast_step, GraphStep):
            reason = GraphStep.unsupported_reason(self.model, self.cache)
        if reason is not None:
            self.fast_step = None
        elif self.fast_step is not None:
            self.fast_step.bind()
        elif self._compiled:
            self.fast_step = self._build_fast_step()

    @torch.inference_mode()
    def run(self, step: Step) -> Tensor:
        """Returns logits [N, V], fp32 (fp64 for an fp64 model), of the rows requested."""
        self.cache.copy_pages(step.copies)
        self.cache.move_states(step.forks, step.dropped)
        pieces, device = step.pieces, self.model.device
        if self._adapter_changes != self.model.adapter_changes:
            self.weights_changed()  # its modules and their adapters, at least
        fast = self.fast_step
        if fast is not None and _decodes_with(fast, pieces):
            return self._decode(fast, pieces)
        lengths = [len(piece.token_ids) for piece in pieces]
        offsets = [piece.start for piece in pieces]
        store = PagedStore(
            self.cache,
            tables=[piece.pages for piece in pieces],
            offsets=offsets,
            lengths=lengths,
            sequence_ids=[piece.sequence_id for piece in pieces],
            paged_only=self.deterministic,
        )
        starts = tuple(piece.prefix for piece in pieces)
        # a decoded token sees all earlier ones anyway, and no kernel has to know of the prefix
        prefixes = tuple(
            n if piece.start < n else 0 for n, piece in zip(starts, pieces, strict=True)
        )
        context = ForwardContext.packed(
            lengths,
            device=device,
            store=store,
            offsets=offsets,
            prefix_lengths=prefixes if any(prefixes) else None,
            position_rows=self._position_rows(lengths, offsets, starts),
            deterministic=self.deterministic,
            adapters=self._adapter_rows(pieces, lengths),
        )
        ids = torch.tensor([i for piece in pieces for i in piece.token_ids], device=device)
        hidden = self.model(ids, context)
        rows: list[int] = []
        end = 0
        for piece, length in zip(pieces, lengths, strict=True):
            end += length
            rows.extend(range(end - piece.num_logit_rows, end))
        if len(rows) < len(ids):
            chosen = torch.tensor(rows, dtype=torch.int64, device=device)
            hidden, context = hidden.index_select(0, chosen), context.of_rows(chosen)
        logits: Tensor = self.model.head(hidden, context)
        return logits

    def _position_rows(
        self, lengths: list[int], offsets: list[int], starts: tuple[int, ...]
    ) -> Tensor | None:
        """Returns the two position rows of GLM [2, T]; None if the model's prompts are causal."""
        if not self.model.config.has_prefix:
            return None
        parts = [torch.arange(o, o + n) for o, n in zip(offsets, lengths, strict=True)]
        return block_position_rows(torch.cat(parts), tuple(lengths), starts).to(self.model.device)

    def _adapter_rows(
        self, pieces: Sequence[ScheduledChunk], lengths: Sequence[int]
    ) -> AdapterRows | None:
        """Returns the adapter of each row; None if the model has no named adapters."""
        if not any(self.model.adapter_sets):
            return None
        names = [piece.adapter for piece in pieces]
        return AdapterRows.of_sequences(names, lengths, device=self.model.device)

    def _decode(self, step: SingleCallStep, pieces: Sequence[ScheduledChunk]) -> Tensor:
        """Runs a single-call step, in which every token is a row with its own table and length."""
        rows = [(piece, i) for piece in pieces for i in range(len(piece.token_ids))]
        widest = max(len(piece.pages) for piece in pieces)
        table = [[*piece.pages, *[0] * (widest - len(piece.pages))] for piece, _ in rows]
        positions = [piece.start + i for piece, i in rows]
        return step.run(
            [piece.token_ids[i] for piece, i in rows],
            positions,
            torch.tensor(table, dtype=torch.int32),
            [position + 1 for position in positions],
            [piece.adapter for piece, _ in rows] if self.model.adapter_sets else (),
        )


def _decodes_with(step: SingleCallStep, pieces: Sequence[ScheduledChunk]) -> bool:
    """Whether a single-call step computes all rows: they only decode, and it has their adapters."""
    only_decodes = all(
        piece.num_logit_rows == len(piece.token_ids) and piece.start >= piece.prefix
        for piece in pieces
    )
    return (
        only_decodes
        and sum(len(piece.token_ids) for piece in pieces) <= step.max_rows
        and step.supports_adapters({piece.adapter for piece in pieces})
    )


def logits_in_passes(
    model: Decoder,
    sequences: Sequence[Sequence[int]],
    passes: Sequence[Sequence[int]],
    *,
    page_size: int = 16,
    compiled: bool = False,
    deterministic: bool = False,
) -> list[Tensor]:
    """Computes the logits of sequences that run through a paged KV cache in several passes.

    Law 3 (docs/verify.md) compares the result with a single forward pass.

    Args:
        model: the model, in inference mode.
        sequences: token ids of each sequence.
        passes: for each sequence, the number of tokens in each of its passes; pass i of all
            sequences is computed as one batch.
        page_size: tokens per page.
        compiled: whether single-call decoding steps may be used.
        deterministic: whether to compute in deterministic mode.

    Returns:
        Logits [T, V] of each sequence.
    """
    sizes = [-(-len(ids) // page_size) for ids in sequences]
    cache = KVCache(model.config, max(1, sum(sizes)), page_size, model.dtype, model.device)
    runner = DecoderRunner(model, cache, compiled=compiled, deterministic=deterministic)
    # in reverse order, because nothing may rely on the order of pages
    tables = [tuple(range(sum(sizes[:i]), sum(sizes[: i + 1])))[::-1] for i in range(len(sizes))]
    rows: list[list[Tensor]] = [[] for _ in sequences]
    done = [0] * len(sequences)
    for turn in range(max(len(lengths) for lengths in passes)):
        pieces = []
        for i, lengths in enumerate(passes):
            if turn < len(lengths):
                ids = tuple(int(t) for t in sequences[i][done[i] : done[i] + lengths[turn]])
                piece = ScheduledChunk(
                    sequence_id=i,
                    token_ids=ids,
                    start=done[i],
                    pages=tables[i],
                    num_logit_rows=len(ids),
                )
                pieces.append(piece)
                done[i] += len(ids)
        counts = [len(piece.token_ids) for piece in pieces]
        logits = runner.run(Step(pieces=tuple(pieces))).split(counts)
        for piece, part in zip(pieces, logits, strict=True):
            rows[piece.sequence_id].append(part)
    return [torch.cat(parts) for parts in rows]
