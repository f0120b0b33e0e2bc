"""The decoding step as a single call into C: from the last tokens of a batch to their logits.

A decoding step in PyTorch consists of a few hundred small operations, each with its own overhead,
although the step should be limited only by reading the weights from memory. The compiled step
reads each weight once and little else.

It supports common dense decoder architectures (`unsupported_reason` returns why a model is not
supported) with weights of fp32, bf16, int8 or int4, every page format of `ops/paged_attention`, and
LoRA adapters, of which each row may use another. Its results equal those of the PyTorch decoder
within rounding; all arithmetic is fp32, even where the weights are bf16. In deterministic mode they
are bitwise equal: the decoder then uses the same kernels.
"""

import ctypes
from collections.abc import Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from easyllm.core.device import bf16_is_fast, cpu_features
from easyllm.core.errors import ConfigError
from easyllm.engine.step_adapters import StepAdapters, layer_linears
from easyllm.engine.step_support import attention_of, unsupported_reason
from easyllm.nn.context import ForwardContext
from easyllm.nn.decoder import Decoder, DecoderLayer
from easyllm.nn.linear import Embedding, Linear
from easyllm.nn.norm import OffsetRMSNorm, RMSNorm
from easyllm.nn.rotary import RotaryPosition
from easyllm.ops.attention_rule import AttentionRule
from easyllm.ops.huge_memory import (
    BufferCache,
    cached_empty,
    empty_like_each,
    in_huge_pages,
    return_freed_memory,
)
from easyllm.ops.kernels import kernels_for, step_structs, structs
from easyllm.ops.kernels.step_structs import MATRICES
from easyllm.ops.kernels.structs import address
from easyllm.ops.paged_attention import Pages, pages_struct

if TYPE_CHECKING:
    from easyllm.nn.position_config import Rope

MAX_ROWS = 32
"""Maximum rows for which a compiled step with quantized weights is faster than the PyTorch decoder
(measurement in docs/kernels.md)."""
MAX_TILED_ROWS = 128
"""The same on a processor with a matrix unit (AMX), which the compiled step uses."""
MAX_DENSE_ROWS = 128
"""The same with fp32 weights, or with bf16 weights if the processor has no bf16 instructions."""
MAX_BF16_ROWS = 32
"""The same with bf16 weights if the processor has bf16 instructions: PyTorch's matmuls use them,
whereas the compiled step widens the weights to fp32."""
MAX_BF16_ROWS_AMX = 2
"""The same if PyTorch's matmuls use a matrix unit, or bf16 instructions of a non-x86 processor."""
FREED_BYTES = 1 << 26
"""Bytes of weights to move before the memory of the old ones is returned to the system."""
FIRST_POSITIONS = 4096
MAPPED_STEPS = 128
"""Steps after which weights that are mapped from a file in small pages are moved to huge pages: the
move takes as long as some tens of steps gain."""
ALIGNMENT = 64


class CompiledStep:
    """Runs decoding steps of one model on one KV cache.

    Args:
        model: the model, in inference mode. Its weights are moved into contiguous huge pages; if
            they are moved or replaced later, the step rebinds to the new ones.
        key_pages, value_pages: cache pages of each layer, [P, K, page_size, d]; their addresses
            must not change.
        deterministic: whether results bitwise equal those of the decoder in deterministic mode.
            With weights of bf16, activations are then rounded to bf16 as in the decoder.

    Raises:
        ConfigError: the model or the pages are not supported.
    """

    def __init__(
        self,
        model: Decoder,
        key_pages: Sequence[Pages],
        value_pages: Sequence[Pages],
        *,
        deterministic: bool = False,
    ) -> None:
        reason = self.unsupported_reason(
            model, (key_pages, value_pages), deterministic=deterministic
        )
        if reason is not None:
            raise ConfigError(f"the compiled step does not support this model: {reason}")
        self.max_rows = _most_rows(model)
        self._rounds = deterministic and model.dtype == torch.bfloat16
        self.vocab_size = model.config.vocab_size
        self.page_size = key_pages[0].shape[2]
        self._model_itself, self._cache = model, (list(key_pages), list(value_pages))
        self._layers = [layer for layer in model.layers if isinstance(layer, DecoderLayer)]
        # runs are often shorter than it takes to move weights that are mapped from a file
        self._moves_after = MAPPED_STEPS if _is_mapped_in_small_pages(model) else None
        if self._moves_after is None:
            gather_weights(model)
        self.bind()
        pages = [pages_struct(k, v) for k, v in zip(key_pages, value_pages, strict=True)]
        self._pages = (structs.Pages * len(pages))(*pages)
        self._memory = torch.empty(0, dtype=torch.uint8)
        # buffers are reused: the system would zero freshly allocated pages in every step
        self._logits = BufferCache(max_buffers=2)
        self._tables: dict[tuple[Rope, int], tuple[Tensor, Tensor]] = {}
        self._num_positions = 0
        self._extend_rope_tables(min(FIRST_POSITIONS, model.config.max_seq_len))

    def bind(self) -> None:
        """Records the addresses of the weights and adapters; copies what is needed in fp32."""
        model = self._model_itself
        self._owners = [m for m in model.modules() if isinstance(m, Linear | Embedding)]
        self._kept: list[object] = [_weight_of(owner) for owner in self._owners]
        self._addresses = [_weight_of(owner).data_ptr() for owner in self._owners]
        layers = [self._layer_struct(layer) for layer in self._layers]
        self._layer_structs = (step_structs.StepLayer * len(layers))(*layers)
        self._model = self._model_struct(model)
        self._num_positions = 0
        self._adapters = StepAdapters(model, rounds=self._rounds)
        self._adapters.enter(self._model, self._layer_structs)

    @staticmethod
    def unsupported_reason(
        model: Decoder,
        pages: tuple[Sequence[Pages], Sequence[Pages]] | None = None,
        *,
        deterministic: bool = False,
    ) -> str | None:
        """Returns why the model, or its cache, is not supported; None if they are.

        The arguments are those of `step_support.unsupported_reason`.
        """
        return unsupported_reason(model, pages, deterministic=deterministic)

    def supports_adapters(self, names: Collection[str]) -> bool:
        """Whether rows may use these adapters (`""` is the base model, or an unnamed adapter)."""
        return self._adapters.supports(names)

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
            positions: position of each token, for RoPE.
            page_table: [S, max_pages] int32, contiguous.
            key_lengths: number of keys of each row's sequence, including that of the row's own
                token, which is stored last. Consecutive rows may be consecutive tokens of one
                sequence (with the same row of the page table), each one key longer.
            adapters: name of the adapter of each row, all supported (`supports_adapters`); by
                default the base model, or its unnamed adapter.

        Returns:
            Logits [S, V] in fp32 after each token.

        Raises:
            ConfigError: a token id is not in the vocabulary, or a length exceeds the page table.
        """
        rows = len(token_ids)
        logits = cached_empty((rows, self.vocab_size), torch.float32, self._logits)
        if rows == 0:
            return logits
        self._check(token_ids, positions, page_table, key_lengths)
        self._move_mapped_weights()
        if [_weight_of(owner).data_ptr() for owner in self._owners] != self._addresses:
            self.bind()
        self._extend_rope_tables(max(positions) + 1)
        numbers = ctypes.c_int64 * rows
        batch = step_structs.StepBatch(
            rows=rows,
            token_ids=numbers(*token_ids),
            positions=numbers(*positions),
            key_lengths=numbers(*key_lengths),
            table=address(page_table),
            table_width=page_table.shape[1],
            pages=self._pages,
            logits=address(logits),
        )
        self._adapters.group(batch, adapters or ("",) * rows)
        kernels = kernels_for(logits)
        assert kernels is not None, "unsupported_reason() requires kernels"
        kernels.decode_step(self._model, batch, self._workspace(kernels, batch))
        return logits

    def _move_mapped_weights(self) -> None:
        """Moves weights that are mapped in small pages to huge ones, after `MAPPED_STEPS` steps."""
        if self._moves_after is None:
            return
        self._moves_after -= 1
        if self._moves_after == 0:
            self._moves_after = None
            if self._model_itself.maps_weights:  # no other engine has moved them
                gather_weights(self._model_itself, again=True)
                self._model_itself.maps_weights = False

    def _check(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        page_table: Tensor,
        key_lengths: Sequence[int],
    ) -> None:
        """Refuses arguments that would make the C code read or write out of bounds."""
        rows, workspace = len(token_ids), page_table.shape[1] * self.page_size
        if not rows == len(positions) == len(key_lengths) == len(page_table):
            raise ConfigError(
                f"{rows} tokens need as many positions, lengths and rows of the page table; got "
                f"{len(positions)}, {len(key_lengths)} and {len(page_table)}"
            )
        if min(token_ids) < 0 or max(token_ids) >= self.vocab_size:
            raise ConfigError(f"a token id is outside the model's ids 0 to {self.vocab_size - 1}")
        if min(key_lengths) < 1 or max(key_lengths) > workspace or min(positions) < 0:
            raise ConfigError(
                f"key lengths {min(key_lengths)} to {max(key_lengths)} do not fit a page table of "
                f"{workspace} tokens"
            )
        if page_table.dtype != torch.int32 or not page_table.is_contiguous():
            raise ConfigError("the page table must be contiguous int32")

    def _workspace(self, kernels: ctypes.CDLL, batch: step_structs.StepBatch) -> int:
        """Returns the address of a workspace large enough for the batch."""
        needed: int = kernels.decode_step_bytes(self._model, batch)
        if needed > self._memory.numel() - ALIGNMENT:
            self._memory = torch.empty(needed * 3 // 2 + ALIGNMENT, dtype=torch.uint8)
        return -(-self._memory.data_ptr() // ALIGNMENT) * ALIGNMENT

    def _extend_rope_tables(self, num_positions: int) -> None:
        """Extends the RoPE tables to at least `num_positions` positions."""
        if num_positions <= self._num_positions:
            return
        self._num_positions = max(num_positions, 2 * self._num_positions)
        context = ForwardContext.packed([self._num_positions])
        for layer, struct in zip(self._layers, self._layer_structs, strict=True):
            position = attention_of(layer).position
            if not isinstance(position, RotaryPosition):
                continue
            key = position.config, position.width
            cos, sin = context.once(key, partial(position.tables, context))
            self._tables[key] = cos, sin
            struct.cosine, struct.sine = cos.data_ptr(), sin.data_ptr()
            struct.pairs = cos.shape[1]

    def _layer_struct(self, layer: DecoderLayer) -> step_structs.StepLayer:
        attention = attention_of(layer)
        config, rule = attention.config, attention.rule
        return step_structs.StepLayer(  # RoPE tables are added by _extend_rope_tables
            matrices=(structs.Matrix * len(MATRICES))(
                *(self._matrix(linear) for linear in layer_linears(layer))
            ),
            mixer_norm=self._norm(layer.mixer_norm),
            feed_forward_norm=self._norm(layer.feed_forward_norm),
            q_norm=self._norm(attention.q_norm),
            k_norm=self._norm(attention.k_norm),
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            dim=config.head_dim,
            slopes=self._slopes(rule),
            window=rule.window or 0,
            scale=rule.scale,
            eps=layer.mixer_norm.eps,
            head_eps=config.qk_norm.eps if config.qk_norm else 0.0,
        )

    def _slopes(self, rule: AttentionRule) -> int | None:
        """Returns the address of ALiBi's slopes; None without them."""
        if rule.terms is None or rule.terms.slopes is None:
            return None
        slopes = torch.tensor(rule.terms.slopes, dtype=torch.float32)
        self._kept.append(slopes)
        return slopes.data_ptr()

    def _model_struct(self, model: Decoder) -> step_structs.StepModel:
        head = model.embed_tokens if model.lm_head is None else model.lm_head
        return step_structs.StepModel(
            embedding=self._matrix(model.embed_tokens),
            head=self._matrix(head),
            final_norm=self._norm(model.norm),
            layers=self._layer_structs,
            num_layers=len(self._layers),
            hidden=model.config.hidden_size,
            embedding_scale=model.config.embedding_scale,
            eps=model.norm.eps,
            rounds=self._rounds,
        )

    def _matrix(self, owner: Linear | Embedding) -> structs.Matrix:
        bias = (
            owner.bias.detach().float()
            if isinstance(owner, Linear) and owner.bias is not None
            else None
        )
        self._kept.append(bias)
        matrix = owner.storage.kernel_matrix(bias)
        assert matrix is not None, "unsupported_reason() requires a format that the kernels read"
        self._kept.append(owner.storage)
        return matrix

    def _norm(self, norm: nn.Module) -> int | None:
        """Returns the address of a norm's weight in fp32; None if there is no norm."""
        if not isinstance(norm, RMSNorm):
            return None
        weight = norm.weight.detach().float()
        if isinstance(norm, OffsetRMSNorm):
            weight = 1 + weight
        self._kept.append(weight)
        return weight.data_ptr()


def _most_rows(model: Decoder) -> int:
    kernels = kernels_for(next(model.parameters()))
    assert kernels is not None, "unsupported_reason() requires kernels"
    has_unit = bool(kernels.tiles_ready())
    if model.packed_formats():
        return MAX_TILED_ROWS if has_unit else MAX_ROWS
    if model.dtype == torch.float32 or not bf16_is_fast(model.device):
        return MAX_DENSE_ROWS
    return MAX_BF16_ROWS_AMX if has_unit or "bf16" in cpu_features() else MAX_BF16_ROWS


def gather_weights(model: Decoder, *, again: bool = False) -> None:
    """Moves the weights of all linears and the embedding into one buffer, in the order of use.

    Each old weight is freed before the next is moved, so that the weights are never all in memory
    twice.

    Args:
        model: the model.
        again: whether to move weights that are in one buffer already.
    """
    owners = [m for m in model.modules() if isinstance(m, Linear | Embedding)]
    if not again and _are_together(owners):
        return  # another engine has already gathered them, or they are mapped from a file
    # inference tensors only if the old weights were: inference tensors cannot be trained
    with torch.inference_mode(_weight_of(owners[0]).is_inference()), torch.no_grad():
        new_weights, freed = empty_like_each([_weight_of(owner) for owner in owners]), 0
        for owner, weight in zip(owners, new_weights, strict=True):
            weight.copy_(_weight_of(owner))
            freed += weight.nbytes
            if freed >= FREED_BYTES:
                return_freed_memory()
                freed = 0
            owner.storage.payload = weight


def _are_together(owners: Sequence[Linear | Embedding]) -> bool:
    return len({_weight_of(owner).untyped_storage().data_ptr() for owner in owners}) == 1


def _is_mapped_in_small_pages(model: Decoder) -> bool:
    """Whether the weights are mapped from one file, and not in huge pages."""
    owners = [holder for _, holder in model.weight_modules()]
    mapped = model.maps_weights and _are_together(owners)
    return mapped and not in_huge_pages(_weight_of(owners[0]))


def _weight_of(owner: Linear | Embedding) -> Tensor:
    """Returns the tensor that stores the weight of a linear or embedding (codes if quantized)."""
    # `owner.storage` alone is slow for a module, and every step asks for the weights of all layers
    storage = owner._modules.get("storage") or owner.storage
    return storage.payload  # type: ignore[return-value]
