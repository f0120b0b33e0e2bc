"""The decoding step on a GPU as a captured CUDA graph: one launch instead of hundreds.

A decoding step with few rows does little arithmetic, so the GPU would wait for Python between its
kernels. The step is therefore captured once as a CUDA graph for each number of rows and width of
the page table, both rounded up to a power of two, and replayed with new inputs. Padding rows write
into a spare page that no sequence uses.

The captured computation is the decoder itself, on a store whose page table is a tensor; results
equal those of the decoder within rounding.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from easyllm.core.errors import ConfigError
from easyllm.engine.kv_cache import KVCache
from easyllm.nn.attention import Attention
from easyllm.nn.config import AttentionConfig, LayerConfig, MoEConfig
from easyllm.nn.context import ForwardContext, RecurrentStep
from easyllm.nn.decoder import Decoder
from easyllm.nn.position_config import BY_LENGTH, Rope
from easyllm.nn.rotary import RotaryPosition
from easyllm.ops.attention_backends import TRITON_PAGES
from easyllm.ops.attention_rule import AttentionRule
from easyllm.ops.gpu import triton_unsupported_reason
from easyllm.ops.paged_attention import Pages, paged_call, write_pages

MAX_ROWS = 256
"""Maximum rows of a captured step; with more rows, launch overhead is small next to the compute."""
FIRST_POSITIONS = 4096
MIN_WIDTH = 16
"""Minimum width, in pages, of the page table of a captured step."""
HEADER = 3
"""Number of integers before each row's page table: token id, position, key length."""


@dataclass(frozen=True, slots=True)
class _CapturedGraph:
    """A captured CUDA graph with its input [rows, HEADER + width] and output [rows, V] buffers."""

    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    logits: Tensor


class GraphStep:
    """Runs decoding steps of one model on one KV cache by replaying CUDA graphs.

    Args:
        model: the model, in inference mode, on a GPU. If its weights are moved or replaced later,
            steps are captured again.
        cache: a cache with a spare page after the others.

    Raises:
        ConfigError: the model or the cache is not supported.
    """

    max_rows = MAX_ROWS

    def __init__(self, model: Decoder, cache: KVCache) -> None:
        reason = self.unsupported_reason(model, cache)
        if reason is not None:
            raise ConfigError(
                f"decoding steps of this model cannot be captured as a CUDA graph: {reason}"
            )
        self.model, self.cache = model, cache
        self._weights = [(m._parameters, name) for m in model.modules() for name in m._parameters]
        self._graphs: dict[tuple[int, int], _CapturedGraph] = {}
        self._pool: Any = None
        self._num_positions = 0
        self._tables: dict[Any, tuple[Tensor, Tensor]] = {}
        self._addresses = self._where()

    @staticmethod
    def unsupported_reason(model: Decoder, cache: KVCache) -> str | None:
        """Returns why the model, or its cache, is not supported; None if they are."""
        if model.training:
            return "it needs inference mode"
        reason = triton_unsupported_reason(*model.parameters())
        if reason is not None:
            return f"the Triton kernels do not support {reason}"
        if packed := model.packed_formats():
            return f"its weights are quantized ({', '.join(sorted(packed))})"
        if model.is_adapted:
            return "it has adapters; merge them"
        if model.config.encoder is not None:
            return "it has an encoder"
        if cache.spare_page is None:
            return "its cache has no spare page"
        for number, layer in enumerate(model.layers):
            reason = _layer_unsupported_reason(
                model.config.layers[number],
                layer.mixer,  # type: ignore[arg-type]
                (cache.keys[number], cache.values[number]),
                model.dtype,
            )
            if reason is not None:
                return f"layer {number}: {reason}"
        return None

    def supports_adapters(self, names: Collection[str]) -> bool:
        """Whether rows may use these adapters: none may, only the base model."""
        return not self.model.adapter_sets and not any(names)

    def bind(self) -> None:
        """Drops all captured graphs; must be called when the weights' addresses have changed."""
        self._graphs.clear()
        self._addresses = self._where()

    def run(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        page_table: Tensor,
        key_lengths: Sequence[int],
        adapters: Sequence[str] = (),
    ) -> Tensor:
        """Decodes one token per row and writes its keys and values into the pages.

        Args:
            token_ids: S token ids.
            positions: position of each token.
            page_table: [S, max_pages] int32, on the CPU.
            key_lengths: number of keys of each row's sequence, including that of the row's own
                token, which is stored last. Consecutive rows may be consecutive tokens of one
                sequence (with the same row of the page table), each one key longer.
            adapters: names of adapters, which must all be empty (`supports_adapters`).

        Returns:
            Logits [S, V] in fp32 after each token, on the model's device.
        """
        assert not any(adapters), "supports_adapters() allows the base model only"
        rows = len(token_ids)
        if self._where() != self._addresses:
            self.bind()
        self._reach(max(positions) + 1)
        shape = _rounded(rows, 1), _rounded(page_table.shape[1], MIN_WIDTH)
        if shape not in self._graphs:
            self._graphs[shape] = self._capture(shape)
        inputs = self._padding_rows(shape)
        head = torch.tensor([token_ids, positions, key_lengths], dtype=torch.int32)
        inputs[:rows, :HEADER] = head.T
        inputs[:rows, HEADER : HEADER + page_table.shape[1]] = page_table
        recording = self._graphs[shape]
        recording.inputs.copy_(inputs)
        recording.graph.replay()
        return recording.logits[:rows].clone()

    def _where(self) -> list[int]:
        """Returns the addresses of the weights."""
        held = (parameters[name] for parameters, name in self._weights)
        return [0 if weight is None else weight.data_ptr() for weight in held]

    def _padding_rows(self, shape: tuple[int, int]) -> Tensor:
        """Returns padding rows [rows, HEADER + width] int32 on the CPU, on the spare page."""
        assert self.cache.spare_page is not None, "unsupported_reason() requires a spare page"
        rows = torch.full((shape[0], HEADER + shape[1]), self.cache.spare_page, dtype=torch.int32)
        rows[:, :HEADER] = torch.tensor([0, 0, 1], dtype=torch.int32)
        return rows

    def _capture(self, shape: tuple[int, int]) -> _CapturedGraph:
        # padding rows: the runs below write into the spare page only
        held = self._padding_rows(shape).to(self.model.device)
        stream = torch.cuda.Stream(self.model.device)
        stream.wait_stream(torch.cuda.current_stream(self.model.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # warm-up: compiles kernels and initializes libraries before capture
                self._step(held)
        torch.cuda.current_stream(self.model.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._step(held)
        self._pool = graph.pool()
        return _CapturedGraph(graph, held, logits)

    def _step(self, inputs: Tensor) -> Tensor:
        """Runs the decoder on the rows described by `inputs: [S, HEADER + width]`."""
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
        """Extends the RoPE tables if needed; drops graphs captured with shorter tables."""
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
        self._graphs.clear()


class _DecodeStore:
    """The `KeyValueStore` of a captured step: one new token per row, page table as a tensor."""

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
        v: Tensor | None,
        rule: AttentionRule,
        prefix_lengths: tuple[int, ...] | None = None,  # noqa: ARG002 - decoding has no prefix
    ) -> Tensor:
        from easyllm.ops.gpu.paged_attention import decode_attention

        keys, values = self.cache.keys[layer], self.cache.values[layer]
        assert isinstance(keys, Tensor), "unsupported_reason() excludes quantized keys"
        assert isinstance(values, Tensor), "unsupported_reason() excludes quantized values"
        assert v is not None, "unsupported_reason() excludes latent attention"
        write_pages(keys, k, self.pages, self.slots)
        write_pages(values, v, self.pages, self.slots)
        return decode_attention(
            *(q, keys, values, self.table, self.key_lengths), scale=rule.scale, window=rule.window
        )

    def recur(self, layer: int, step: RecurrentStep, *inputs: Tensor) -> Tensor:  # noqa: ARG002
        raise AssertionError("unsupported_reason() excludes linear attention")


def _layer_unsupported_reason(
    config: LayerConfig,
    mixer: Attention,
    pages: tuple[Pages | None, Pages | None],
    dtype: torch.dtype,
) -> str | None:
    """Returns why a layer cannot be captured; None if it can.

    The reasons are tensor shapes that depend on values, and what the attention kernel does not
    support.
    """
    keys, values = pages
    if isinstance(config.feed_forward, MoEConfig):
        return "a mixture of experts, whose tensor shapes depend on the routing"
    if not isinstance(config.mixer, AttentionConfig) or keys is None or values is None:
        return config.mixer.kind.replace("_", " ")
    position = config.mixer.position
    if isinstance(position, Rope) and isinstance(position.scaling, BY_LENGTH):
        return "RoPE frequencies that change with the length (dynamic NTK)"
    call = paged_call(keys, values, mixer.rule, dtype, captured=True)
    reason = TRITON_PAGES.unsupported_reason(call)
    return None if reason is None else f"attention with {reason}"


def _rounded(count: int, least: int) -> int:
    """Returns the smallest power of two that is at least `count` and at least `least`."""
    return max(least, 1 << (count - 1).bit_length())
