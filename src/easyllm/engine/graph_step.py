"""The decoding step on a GPU as a recorded graph: one launch instead of hundreds.

A step of few rows does little arithmetic, and a GPU would wait for Python between its kernels. Recorded once as a CUDA
graph for a number of rows and a width of the page table, each rounded up to a power of two, it is replayed with new ids.
Rows that only fill up the number write into a spare page that belongs to nobody.

What is recorded is the decoder itself, over a store whose tables are tensors; results are those of the decoder within
rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from easyllm.core.errors import ConfigError
from easyllm.engine.kv_cache import KVCache
from easyllm.nn.attention import Attention
from easyllm.nn.config import AttentionConfig, DynamicNTKScaling, LayerConfig, MoEConfig, Rope
from easyllm.nn.context import ForwardContext, RecurrentStep
from easyllm.nn.decoder import Decoder
from easyllm.nn.position import RotaryPosition
from easyllm.ops.attention import AttentionRule
from easyllm.ops.gpu import gpu_ready
from easyllm.ops.paged_attention import write_pages

MOST_ROWS = 256
"""Rows up to which steps are recorded; above, launches cost little beside the work."""
FIRST_POSITIONS = 4096
LEAST_WIDTH = 16
"""Pages of the narrowest table recorded."""
HEADER = 3
"""Numbers in front of each row's table: id, position, length."""


@dataclass(frozen=True, slots=True)
class _Recording:
    """A graph, the memory its inputs [rows, HEADER + width] are read from, and its logits [rows, V]."""

    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    logits: Tensor


class GraphStep:
    """Replays decoding steps of one model over one cache.

    Args:
        model: in inference mode, on a GPU. Where somebody moves or replaces its weights later, steps are recorded anew.
        cache: with a spare page behind the others.

    Raises:
        ConfigError: the model or the cache is not served.
    """

    most_rows = MOST_ROWS

    def __init__(self, model: Decoder, cache: KVCache) -> None:
        refusal = self.refusal(model, cache)
        if refusal is not None:
            raise ConfigError(f"decoding steps of this model are not recorded: {refusal}")
        self.model, self.cache = model, cache
        self._weights = [(m._parameters, name) for m in model.modules() for name in m._parameters]
        self._recordings: dict[tuple[int, int], _Recording] = {}
        self._pool: Any = None
        self._num_positions = 0
        self._tables: dict[Any, tuple[Tensor, Tensor]] = {}
        self._addresses = self._where()

    @staticmethod
    def refusal(model: Decoder, cache: KVCache) -> str | None:
        """Why the model is not served; None if it is."""
        if model.training or not gpu_ready(*model.parameters()):
            return "it needs inference mode, a GPU, weights of fp32, bf16 or fp16, and Triton"
        if packed := model.packed_formats():
            return f"its weights are quantized ({', '.join(sorted(packed))})"
        if model.is_adapted:
            return "it has adapters; merge them"
        if cache.spare_page is None or not all(
            isinstance(x, Tensor) for x in (*cache.keys, *cache.values)
        ):
            return "a layer keeps a state, or quantized keys"
        for number, layer in enumerate(model.layers):
            refusal = _layer_refusal(model.config.layers[number], layer.mixer)  # type: ignore[arg-type]
            if refusal is not None:
                return f"layer {number}: {refusal}"
        return None

    @classmethod
    def supports(cls, model: Decoder, cache: KVCache) -> bool:
        """Whether the model is served."""
        return cls.refusal(model, cache) is None

    def bind(self) -> None:
        """Forgets what was recorded: the weights have changed their places."""
        self._recordings.clear()
        self._addresses = self._where()

    def run(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        page_table: Tensor,
        key_lengths: Sequence[int],
    ) -> Tensor:
        """Logits after each token; its keys and values go into the pages.

        Args:
            token_ids: S ids.
            positions: of each token.
            page_table: [S, max_pages] int32, on the CPU.
            key_lengths: tokens of each sequence with this one, which is stored last of them. Tokens of one sequence
                may follow one another (with the same row of the table), each a key longer.

        Returns:
            [S, V] fp32, on the model's device.
        """
        rows = len(token_ids)
        if self._where() != self._addresses:
            self.bind()
        self._reach(max(positions) + 1)
        shape = _rounded(rows, 1), _rounded(page_table.shape[1], LEAST_WIDTH)
        if shape not in self._recordings:
            self._recordings[shape] = self._record(shape)
        inputs = self._idle_rows(shape)
        head = torch.tensor([token_ids, positions, key_lengths], dtype=torch.int32)
        inputs[:rows, :HEADER] = head.T
        inputs[:rows, HEADER : HEADER + page_table.shape[1]] = page_table
        recording = self._recordings[shape]
        recording.inputs.copy_(inputs)
        recording.graph.replay()
        return recording.logits[:rows].clone()

    def _where(self) -> list[int]:
        """Addresses of the weights."""
        held = (parameters[name] for parameters, name in self._weights)
        return [0 if weight is None else weight.data_ptr() for weight in held]

    def _idle_rows(self, shape: tuple[int, int]) -> Tensor:
        """[rows, HEADER + width] int32 on the CPU: rows that write into the spare page."""
        assert self.cache.spare_page is not None, "refused otherwise"
        rows = torch.full((shape[0], HEADER + shape[1]), self.cache.spare_page, dtype=torch.int32)
        rows[:, :HEADER] = torch.tensor([0, 0, 1], dtype=torch.int32)
        return rows

    def _record(self, shape: tuple[int, int]) -> _Recording:
        held = self._idle_rows(shape).to(self.model.device)  # the runs below write nowhere else
        stream = torch.cuda.Stream(self.model.device)
        stream.wait_stream(torch.cuda.current_stream(self.model.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels are compiled and libraries set up outside the graph
                self._step(held)
        torch.cuda.current_stream(self.model.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._step(held)
        self._pool = graph.pool()
        return _Recording(graph, held, logits)

    def _step(self, inputs: Tensor) -> Tensor:
        """The decoder on rows described by `inputs: [S, HEADER + width]`."""
        ids, positions, lengths = (inputs[:, i].contiguous() for i in range(HEADER))
        table = inputs[:, HEADER:].contiguous()
        positions = positions.long()
        store = _DecodeStore(self.cache, table, lengths)
        context = ForwardContext(positions=positions, lengths=(1,) * len(ids), store=store)
        for key, (cos, sin) in self._tables.items():
            context.memo[key] = cos[positions], sin[positions]
        logits: Tensor = self.model.head(self.model(ids.long(), context))
        return logits

    def _reach(self, num_positions: int) -> None:
        """Makes the rotations' tables long enough; what was recorded with shorter ones is forgotten."""
        if num_positions <= self._num_positions:
            return
        longest = max(num_positions, 2 * self._num_positions, FIRST_POSITIONS)
        self._num_positions = longest
        context = ForwardContext.packed([longest], device=self.model.device)
        self._tables = {
            (module.config, module.width): module.tables(context)
            for module in self.model.modules()
            if isinstance(module, RotaryPosition)
        }
        self._recordings.clear()


class _DecodeStore:
    """One new token a row, with tables that are tensors (the `KeyValueStore` of a recorded step)."""

    def __init__(self, cache: KVCache, table: Tensor, key_lengths: Tensor) -> None:
        self.cache, self.table, self.key_lengths = cache, table, key_lengths
        last = (key_lengths - 1).long()
        rows = torch.arange(len(table), device=table.device)
        self.pages = table[rows, last // cache.page_size].long()
        self.slots = last % cache.page_size

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rule: AttentionRule,
        prefix_lengths: tuple[int, ...] | None = None,  # noqa: ARG002 - a decoding step holds no prefix
    ) -> Tensor:
        from easyllm.ops.gpu.paged_attention import decode_attention

        keys, values = self.cache.keys[layer], self.cache.values[layer]
        assert isinstance(keys, Tensor), "refused otherwise"
        assert isinstance(values, Tensor), "refused otherwise"
        write_pages(keys, k, self.pages, self.slots)
        write_pages(values, v, self.pages, self.slots)
        return decode_attention(
            *(q, keys, values, self.table, self.key_lengths), scale=rule.scale, window=rule.window
        )

    def recur(self, layer: int, step: RecurrentStep, *inputs: Tensor) -> Tensor:  # noqa: ARG002 - the protocol's
        raise AssertionError("refused: linear attention")


def _layer_refusal(config: LayerConfig, mixer: Attention) -> str | None:
    """What cannot be recorded of a layer: shapes that hang on values, or attention the kernel does not know."""
    if isinstance(config.feed_forward, MoEConfig):
        return "experts are given rows by their router"
    if not isinstance(config.mixer, AttentionConfig):
        return "linear attention"
    rule, position = mixer.rule, config.mixer.position
    if not (rule.plain and rule.causal) or rule.num_sinks:
        return "attention with a soft cap, sinks, score positions or without a causal mask"
    if isinstance(position, Rope) and isinstance(position.scaling, DynamicNTKScaling):
        return "frequencies that change with the length"
    return None


def _rounded(count: int, least: int) -> int:
    """The power of two at or above `count`, at least `least`."""
    return max(least, 1 << (count - 1).bit_length())
