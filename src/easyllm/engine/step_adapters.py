"""LoRA adapters in the form that the compiled decoding step reads: a table of updates."""

import ctypes
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch

from easyllm.engine.step_support import attention_of
from easyllm.nn.decoder import Decoder, DecoderLayer
from easyllm.nn.glu import GLU
from easyllm.nn.linear import Linear, LinearAdapter
from easyllm.ops.kernels.step_structs import (
    MATRICES,
    OUTPUTS,
    StepBatch,
    StepLayer,
    StepModel,
)
from easyllm.ops.kernels.structs import LowRankUpdate

if TYPE_CHECKING:
    from easyllm.adapters.adapter_set import AdapterSet
    from easyllm.ops.low_rank import LowRank


class StepAdapters:
    """The adapters of a model that are LoRA updates of its matrices.

    Args:
        model: the model.
        rounds: whether activations, hence A and B too, are bf16.
    """

    def __init__(self, model: Decoder, *, rounds: bool) -> None:
        self._dtype = torch.bfloat16 if rounds else torch.float32
        layers = [layer for layer in model.layers if isinstance(layer, DecoderLayer)]
        self._linears = [linear for layer in layers for linear in layer_linears(layer)]
        self._linears += [] if model.lm_head is None else [model.lm_head]
        self._kept: list[LowRank] = []  # the structs refer to their memory
        self._rows: list[ctypes.Array[LowRankUpdate]] = []
        self._max_rank = 0
        self._unnamed_is_base = "" not in model.adapter_sets
        found = {name: self._updates(its) for name, its in model.adapter_sets.items()}
        self._tables = {name: table for name, table in found.items() if table is not None}
        self._numbers = {name: number for number, name in enumerate(self._tables)}

    def supports(self, names: Collection[str]) -> bool:
        """Whether rows may use these adapters; `""` is the base model, or an unnamed adapter."""
        return all(name in self._numbers or (not name and self._unnamed_is_base) for name in names)

    def enter(self, model: StepModel, layers: "ctypes.Array[StepLayer]") -> None:
        """Enters the tables of updates into the structs of a model and its layers."""
        model.num_adapters = len(self._tables)
        model.max_rank = -(-self._max_rank // OUTPUTS) * OUTPUTS
        count = len(MATRICES)
        for number, layer in enumerate(layers):
            layer.updates = self._row(number * count, count)
        model.head_updates = self._row(len(layers) * count, 1)

    def group(self, batch: StepBatch, names: Sequence[str]) -> None:
        """Groups the rows of a batch by adapter; rows of the base model are in no group."""
        groups: dict[int, list[int]] = {}
        for row, name in enumerate(names):
            if name in self._numbers:
                groups.setdefault(self._numbers[name], []).append(row)
        if not groups:
            return
        starts = [0]
        for its in groups.values():
            starts.append(starts[-1] + len(its))
        batch.num_groups = len(groups)
        batch.group_adapters = (ctypes.c_int64 * len(groups))(*groups)
        batch.group_starts = (ctypes.c_int64 * len(starts))(*starts)
        rows = (row for its in groups.values() for row in its)
        batch.group_rows = (ctypes.c_int64 * starts[-1])(*rows)

    def _row(self, first: int, count: int) -> "ctypes.Array[LowRankUpdate] | None":
        """Returns the updates [count, adapters] of matrices from `first` on; None without any."""
        each = [
            table.get(number, LowRankUpdate())
            for number in range(first, first + count)
            for table in self._tables.values()
        ]
        if not any(update.down.outputs for update in each):
            return None
        row = (LowRankUpdate * len(each))(*each)
        self._rows.append(row)
        return row

    def _updates(self, adapters: "AdapterSet") -> dict[int, LowRankUpdate] | None:
        """Returns the updates of an adapter by the number of the matrix.

        None if it changes anything else, or in another form.
        """
        if adapters.embeddings or adapters.model_adapter is not None:
            return None
        numbers = {id(linear): number for number, linear in enumerate(self._linears)}
        found: dict[int, LowRankUpdate] = {}
        for linear, adapter in adapters.linears.values():
            number = numbers.get(id(linear))
            update = None if number is None else self._update(adapter)
            if number is None or update is None:
                return None
            found[number] = update
        return found

    def _update(self, adapter: LinearAdapter) -> LowRankUpdate | None:
        update = adapter.low_rank()
        if update is None:
            return None
        self._max_rank = max(self._max_rank, len(update.down))
        self._kept.append(update := update.to(self._dtype))
        return update.struct()


def layer_linears(layer: DecoderLayer) -> tuple[Linear, ...]:
    """Returns the linears of a layer of a supported model, in the order of `MATRICES`."""
    attention, feed_forward = attention_of(layer), layer.feed_forward
    assert isinstance(feed_forward, GLU), "unsupported_reason() requires a GLU"
    return (
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(feed_forward.gate_proj, feed_forward.up_proj, feed_forward.down_proj),
    )


__all__ = ["StepAdapters", "layer_linears"]
