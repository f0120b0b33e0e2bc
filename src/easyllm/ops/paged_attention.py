"""Attention over a paged KV cache, for a batch of sequences in one call.

Shapes: T packed new tokens, S sequences, H query heads, K key-value heads, d head_dim, P pages.

The queries are the newest tokens of each sequence; their keys are already in the pages. Pages store
fp32 or bf16 or, for a smaller cache, int8 (symmetric) or int4 (scale and minimum), with a scale for
every token and head:

    int8   s = max|x| / 127               x̂ = s q,       |x - x̂| ≤ s / 2
    int4   s = (max x - min x) / 15       x̂ = s q + m,   |x - x̂| ≤ s / 2

`attention_backends` picks the implementation: the C kernel on a CPU, FlashAttention over gathered
keys on a GPU, and the reference for everything else. In all of them a query's
result is independent of the batch composition and of the location of its pages. The C kernel is
bitwise batch-invariant, which deterministic serving relies on: its softmax is merged over splits of
64 keys with fixed positions.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from easyllm.ops.attention import attend_segment
from easyllm.ops.attention_backends import C_PAGES, FLASH, AttentionCall, pick_backend
from easyllm.ops.attention_rule import AttentionRule
from easyllm.ops.flash import flash_attention
from easyllm.ops.huge_memory import growing_empty
from easyllm.ops.kernels import kernels_for, structs
from easyllm.ops.kernels.structs import BIT_CODES, DTYPE_CODES, address, has_contiguous_heads

MIN_UNCHUNKED_PROMPT = 64
"""Minimum tokens of an unchunked prompt for which PyTorch's attention is faster.

At 512 tokens it is 3 times as fast in bf16 with AMX, and a quarter faster in fp32.
"""


@dataclass(frozen=True, slots=True)
class QuantizedPages:
    """Pages of a KV cache in int8 or int4.

    Attributes:
        codes: [P, K, page_size, d] int8, or [P, K, page_size, d/2] uint8, which stores dim i in the
            low and dim i + d/2 in the high nibble of byte i.
        scales: fp32; [P, K, page_size, 1], or [P, K, page_size, 2] with scale and minimum for int4.
    """

    codes: Tensor
    scales: Tensor

    @property
    def bits(self) -> int:
        """Bits per element, 4 or 8."""
        return 8 if self.codes.dtype == torch.int8 else 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Logical shape, [P, K, page_size, d]."""
        pages, kv_heads, size, width = self.codes.shape
        return pages, kv_heads, size, width * 8 // self.bits

    @property
    def format(self) -> str:
        """Name of the format, `"int8"` or `"int4"`."""
        return "int8" if self.codes.dtype == torch.int8 else "int4"


Pages = Tensor | QuantizedPages
QUANTIZED_PAGES = ("int8", "int4")


def new_pages(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype | str,
    device: torch.device | str = "cpu",
) -> Pages:
    """Returns uninitialized pages.

    Args:
        shape: [P, K, page_size, d].
        dtype: a torch dtype, `"int8"` or `"int4"`.
        device: device of the pages.

    Raises:
        ValueError: the format is unknown, or int4 is requested for an odd head_dim.
    """
    if isinstance(dtype, torch.dtype):
        return _empty(shape, dtype, device)
    rows, dim = shape[:3], shape[3]
    if dtype == "int8":
        codes = _empty(shape, torch.int8, device)
        return QuantizedPages(codes, _empty((*rows, 1), torch.float32, device))
    if dtype != "int4":
        raise ValueError(f"unknown page format {dtype!r}; use a torch dtype, 'int8' or 'int4'")
    if dim % 2:
        raise ValueError(f"int4 pages need an even head_dim, got {dim}; use int8")
    codes = _empty((*rows, dim // 2), torch.uint8, device)
    return QuantizedPages(codes, _empty((*rows, 2), torch.float32, device))


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    if torch.device(device).type == "cpu":
        return growing_empty(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=device)


def element_bytes(dtype: torch.dtype | str, head_dim: int) -> float:
    """Returns the bytes per element of pages, scales included.

    >>> element_bytes("int4", 64), element_bytes(torch.bfloat16, 64)
    (0.625, 2)
    """
    match dtype:
        case "int8":
            return 1 + 4 / head_dim
        case "int4":
            return 0.5 + 8 / head_dim
    assert isinstance(dtype, torch.dtype), "checked by new_pages()"
    return dtype.itemsize


def write_pages(pages: Pages, x: Tensor, page_ids: Tensor, slots: Tensor) -> None:
    """Writes keys or values `x: [T, K, d]` to pages.

    Token t is stored in slot `slots[t]` of page `page_ids[t]`; both are integers [T].
    """
    if isinstance(pages, Tensor):
        pages[page_ids, :, slots] = x.to(pages.dtype)
        return
    codes, scales = quantize_heads(x, pages.bits)
    pages.codes[page_ids, :, slots] = codes
    pages.scales[page_ids, :, slots] = scales


def quantize_heads(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Returns codes and scales of `x: [..., d]` as in `QuantizedPages`, with one scale per row."""
    wide = x.float()
    if bits == 8:
        step = (wide.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
        return (wide / step).round().to(torch.int8), step
    least = wide.amin(-1, keepdim=True)
    step = ((wide.amax(-1, keepdim=True) - least) / 15).clamp(min=1e-30)
    codes = ((wide - least) / step).round().clamp(0, 15).to(torch.uint8)
    low, high = codes.chunk(2, dim=-1)
    return low | (high << 4), torch.cat([step, least], dim=-1)


def dequantize_heads(codes: Tensor, scales: Tensor) -> Tensor:
    """Returns the fp32 values [..., d] of codes and scales."""
    if codes.dtype == torch.int8:
        return codes.float() * scales
    values = torch.cat([codes & 15, codes >> 4], dim=-1).float()
    return values * scales[..., :1] + scales[..., 1:]


def paged_attention(
    q: Tensor,
    key_pages: Pages,
    value_pages: Pages,
    page_table: Tensor,
    lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    rule: AttentionRule,
    prefix_lengths: tuple[int, ...] | None = None,
    *,
    new: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Computes attention of each sequence's new tokens over all its keys.

    Args:
        q: [T, H, d] queries, fp32 or bf16; sequences are packed end to end.
        key_pages, value_pages: [P, K, page_size, d]; H % K == 0.
        page_table: [S, max_pages] int32; entry i is the page of the sequence's tokens from
            i · page_size on. Entries beyond the sequence's length, and entries of pages that a
            window hides completely, are not read.
        lengths: number of new tokens of each sequence, summing to T.
        key_lengths: number of all tokens of each sequence; the new ones are last.
        rule: scale, mask and position terms.
        prefix_lengths: number of leading tokens of each sequence that see each other
            bidirectionally.
        new: keys and values [T, K, d] of the new tokens, as stored in the pages. A prompt whose
            keys are all among them may attend to these instead of the pages.

    Returns:
        [T, H, d], dtype of `q`.
    """
    call = paged_call(
        key_pages,
        value_pages,
        rule,
        q.dtype,
        table=page_table,
        gradients=torch.is_grad_enabled() and q.requires_grad,
        prefix=prefix_lengths is not None,
    )
    backend = pick_backend(call)
    if backend is C_PAGES:
        if new is not None:
            # a window that hides keys needs a mask, which is slow
            most = rule.window or max(lengths, default=0)
            pairs = zip(lengths, key_lengths, strict=True)
            whole = [n == m and MIN_UNCHUNKED_PROMPT <= n <= most for n, m in pairs]
            if any(whole):
                pages = key_pages, value_pages, page_table
                return _unchunked_prompts_by_sdpa(q, new, whole, pages, lengths, key_lengths, rule)
        return _run_kernel(q, key_pages, value_pages, page_table, lengths, key_lengths, rule)
    if backend is FLASH:
        at = _all_positions(page_table, key_lengths, key_pages.shape[2])
        k, v = (pages[at[0], :, at[1]] for pages in (key_pages, value_pages))  # type: ignore[index]
        return flash_attention(q, k, v, lengths, key_lengths, scale=rule.scale, window=rule.window)
    return reference_paged_attention(
        q, key_pages, value_pages, page_table, lengths, key_lengths, rule, prefix_lengths
    )


def paged_call(
    keys: Pages,
    values: Pages,
    rule: AttentionRule,
    dtype: torch.dtype,
    *,
    table: Tensor | None = None,
    gradients: bool = False,
    prefix: bool = False,
    captured: bool = False,
) -> AttentionCall:
    """Returns the description of a call over pages, by which a backend is picked.

    Args:
        keys, values: pages, [P, K, page_size, d].
        rule: scale, mask and position terms.
        dtype: dtype of the queries.
        table: the page table, if it is known already.
        gradients: whether gradients of the queries are needed.
        prefix: whether a sequence has a bidirectional prefix.
        captured: whether the call is part of a CUDA graph of a decoding step.
    """
    k = keys if isinstance(keys, Tensor) else keys.codes
    v = values if isinstance(values, Tensor) else values.codes
    addressable = k.shape == v.shape and k.is_contiguous() and v.is_contiguous()
    if table is not None and addressable:
        addressable = table.is_contiguous() and table.dtype == torch.int32
        addressable = addressable and table.device == k.device
    return AttentionCall(
        rule,
        k.device,
        dtype,
        k.dtype if k is keys else keys.format,  # type: ignore[union-attr]
        v.dtype if v is values else values.format,  # type: ignore[union-attr]
        keys.shape[3],
        gradients=gradients,
        prefix=prefix,
        page_size=keys.shape[2],
        addressable=addressable,
        captured=captured,
    )


def _unchunked_prompts_by_sdpa(
    q: Tensor,
    new: tuple[Tensor, Tensor],
    whole: list[bool],
    pages: tuple[Pages, Pages, Tensor],
    lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    rule: AttentionRule,
) -> Tensor:
    """Computes sequences marked `whole` with PyTorch's attention, the others over their pages."""
    key_pages, value_pages, table = pages
    out = torch.empty(q.shape, dtype=q.dtype)
    targets, queries, keys, values = (x.split(lengths) for x in (out, q, *new))
    rest = [i for i, alone in enumerate(whole) if not alone]
    for i, alone in enumerate(whole):
        if alone:
            targets[i].copy_(attend_segment(queries[i], keys[i], values[i], rule))
    if rest:
        rows = torch.cat([torch.arange(len(out)).split(lengths)[i] for i in rest])
        out[rows] = _run_kernel(
            q[rows],
            key_pages,
            value_pages,
            table[rest].contiguous(),
            tuple(lengths[i] for i in rest),
            tuple(key_lengths[i] for i in rest),
            rule,
        )
    return out


def reference_paged_attention(
    q: Tensor,
    key_pages: Pages,
    value_pages: Pages,
    page_table: Tensor,
    lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    rule: AttentionRule,
    prefix_lengths: tuple[int, ...] | None = None,
) -> Tensor:
    """Reference for `paged_attention` in plain PyTorch, one sequence at a time, for any rule."""
    out = []
    for n, query in enumerate(q.split(lengths)):
        prefix = prefix_lengths[n] if prefix_lengths else 0
        if not len(query):
            continue
        before = key_lengths[n] - lengths[n]
        assert not 0 < before < prefix, "a prefix must be complete in its sequence's first pass"
        seen = _seen_positions(lengths[n], key_lengths[n], rule, prefix).to(q.device)
        k = gather_pages(key_pages, page_table[n], seen).to(q.dtype)
        v = gather_pages(value_pages, page_table[n], seen).to(q.dtype)
        out.append(attend_segment(query, k, v, rule, prefix=prefix, key_positions=seen))
    return torch.cat(out) if out else torch.empty_like(q)


def gather_pages(pages: Pages, table: Tensor, positions: Tensor) -> Tensor:
    """Gathers keys or values of one sequence from its pages.

    Args:
        pages: [P, K, page_size, d].
        table: page ids of the sequence, [max_pages].
        positions: token positions, [N].

    Returns:
        [N, K, d]; fp32 for quantized pages, else the dtype of the pages.
    """
    size = pages.shape[2]
    page_ids, slots = table[positions // size].long(), positions % size
    if isinstance(pages, Tensor):
        return pages[page_ids, :, slots]
    return dequantize_heads(pages.codes[page_ids, :, slots], pages.scales[page_ids, :, slots])


def _all_positions(
    table: Tensor, key_lengths: tuple[int, ...], page_size: int
) -> tuple[Tensor, Tensor]:
    """Returns page and slot of every token of all sequences, packed end to end: two [U] int64."""
    counts = torch.tensor(key_lengths, device=table.device)
    total = sum(key_lengths)
    row = torch.repeat_interleave(counts, output_size=total)
    begin = (counts.cumsum(0) - counts)[row]
    position = torch.arange(total, device=table.device) - begin
    return table[row, position // page_size].long(), position % page_size


def _seen_positions(length: int, key_length: int, rule: AttentionRule, prefix: int) -> Tensor:
    """Returns the positions of the keys that any of the last `length` tokens sees."""
    positions = torch.arange(key_length)
    if rule.window is None or not rule.causal or prefix:
        return positions
    first = key_length - length - rule.window + 1
    return positions[(positions >= first) | (positions < rule.num_sinks)]


def pages_struct(keys: Pages, values: Pages) -> structs.Pages:
    """Returns the pages of one layer as the kernels expect them."""
    _, kv_heads, page_size, dim = keys.shape
    if isinstance(keys, Tensor) and isinstance(values, Tensor):
        return structs.Pages(
            keys=address(keys),
            values=address(values),
            kv_heads=kv_heads,
            page_size=page_size,
            dim=dim,
            format=DTYPE_CODES[keys.dtype],
        )
    assert isinstance(keys, QuantizedPages), "keys and values have the same format"
    assert isinstance(values, QuantizedPages), "keys and values have the same format"
    return structs.Pages(
        keys=address(keys.codes),
        values=address(values.codes),
        key_scales=address(keys.scales),
        value_scales=address(values.scales),
        kv_heads=kv_heads,
        page_size=page_size,
        dim=dim,
        format=BIT_CODES[keys.bits],
    )


def _run_kernel(
    q: Tensor,
    keys: Pages,
    values: Pages,
    table: Tensor,
    lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    rule: AttentionRule,
) -> Tensor:
    kernels = kernels_for(q)
    assert kernels is not None, "picked by paged_attention()"
    if not has_contiguous_heads(q):
        q = q.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype)
    queries = structs.Queries(
        heads=q.shape[1],
        q_stride=q.stride(0),
        dtype=DTYPE_CODES[q.dtype],
        scale=rule.scale,
        window=rule.window or 0,
    )
    if rule.terms is not None and rule.terms.slopes is not None:
        queries.slopes = (ctypes.c_float * q.shape[1])(*rule.terms.slopes)
    numbers = ctypes.c_int64 * len(lengths)
    batch = structs.PagedBatch(
        q=address(q),
        out=address(out),
        table=address(table),
        lengths=numbers(*lengths),
        key_lengths=numbers(*key_lengths),
        table_width=table.shape[1],
        num_sequences=len(lengths),
    )
    kernels.paged_attention(batch, pages_struct(keys, values), queries)
    return out
