"""Which attention implementation computes a call, and why the others do not.

A backend states what it does not support as a noun phrase ("a soft cap"), which completes "the
model has attention with ..." or "FlashAttention does not support ...". `pick_backend` returns the
first backend, in order of preference, that has no reason against the call. Whatever depends on an
implementation (deterministic mode, the compiled step, the CUDA graph step, the memory plan) asks
the backend that it relies on.

The choice is made in every layer of every forward pass, so it only compares fields of a tuple and
takes one to two microseconds. It is not cached by the call, because a rule may refer to a module
(its position terms), which a cache would keep alive.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch

from easyllm.ops.attention_rule import AttentionRule
from easyllm.ops.gpu.support import triton_dtype_unsupported_reason
from easyllm.ops.kernels.build import kernels_unsupported_reason

HEAD_DIM_OF_TRAINING = 16
"""The C kernels for training need a head_dim that is a multiple of this."""
KEYS_PER_BLOCK = 8
"""Keys, and elements of a head, that the C kernel for pages processes at a time; the keys of a
block must be in one page."""
FLASH_DTYPES = frozenset({torch.bfloat16, torch.float16})
MAX_FLASH_HEAD_DIM = 256
AMPERE = 8
"""Minimum CUDA compute capability (major version) of FlashAttention."""


class AttentionCall(NamedTuple):
    """What a backend has to know about a call to `attention` or `paged_attention`.

    Attributes:
        rule: scale, mask and position terms of the layer.
        device: device of queries, keys and values.
        dtype: dtype of the queries.
        key_format, value_format: dtype of keys and values, or the format of quantized pages
            (`"int8"`, `"int4"`).
        head_dim: elements of a head.
        gradients: whether a gradient of queries, keys or values is needed.
        prefix: whether a sequence has a prefix whose tokens see each other bidirectionally.
        page_size: tokens per page of a KV cache; 0 if the keys are packed like the queries.
        addressable: whether C code can read pages and page table in place: contiguous, keys and
            values of one shape, the table int32 on their device.
        captured: whether the call is part of a CUDA graph of a decoding step, where lengths are
            tensors on the GPU.
    """

    rule: AttentionRule
    device: torch.device
    dtype: torch.dtype
    key_format: torch.dtype | str
    value_format: torch.dtype | str
    head_dim: int
    gradients: bool = False
    prefix: bool = False
    page_size: int = 0
    addressable: bool = True
    captured: bool = False


@dataclass(frozen=True, slots=True)
class AttentionBackend:
    """An implementation of attention.

    Attributes:
        name: its name in messages.
        rule_unsupported_reason: returns what it does not support in a layer's settings, or None.
        call_unsupported_reason: returns what it does not support in the rest of a call, or None.
    """

    name: str
    rule_unsupported_reason: Callable[[AttentionRule], str | None]
    call_unsupported_reason: Callable[[AttentionCall], str | None]

    def unsupported_reason(self, call: AttentionCall) -> str | None:
        """Returns the first property of the call that is not supported; None if all are."""
        return self.rule_unsupported_reason(call.rule) or self.call_unsupported_reason(call)


def pick_backend(call: AttentionCall) -> AttentionBackend:
    """Returns the first backend, in order of preference, that supports the call."""
    for backend in PAGED_BACKENDS if call.page_size else PACKED_BACKENDS:
        if backend.unsupported_reason(call) is None:
            return backend
    raise AssertionError("explicit attention supports every call")


def _plain_rule(rule: AttentionRule) -> str | None:
    """Kernels whose scores are plain dot products under a causal, windowed or no mask."""
    if rule.softcap is not None:
        return "a soft cap"
    if rule.terms is not None:
        return "positions that change the scores"
    if rule.num_sinks:
        return "sinks"
    if rule.window is not None and not rule.causal:
        return "a sliding window without a causal mask"
    if rule.directions is not None and not rule.causal:
        return "heads with directions of their own"
    return None


def _plain_causal_rule(rule: AttentionRule) -> str | None:
    return _plain_rule(rule) if rule.causal else "no causal mask"


def _c_pages_rule(rule: AttentionRule) -> str | None:
    if rule.terms is not None and rule.terms.slopes is not None:
        rule = replace(rule, terms=None)
    return _plain_causal_rule(rule)


def _sdpa_rule(rule: AttentionRule) -> str | None:
    if rule.softcap is not None:
        return "a soft cap"
    if rule.terms is not None and rule.terms.bias is None:
        return "positions that change the scores other than by a bias"
    return None


def _no_reason(_described: AttentionRule | AttentionCall) -> None:
    """Returns None: everything is supported."""


def _c_training(call: AttentionCall) -> str | None:
    if not call.gradients:
        return "a forward pass without gradients"
    if call.page_size:
        return "keys in pages"
    if call.prefix:
        return "a bidirectional prefix"
    if not call.dtype == call.key_format == call.value_format:
        return "queries, keys and values of different dtypes"
    if call.head_dim % HEAD_DIM_OF_TRAINING:
        return f"head_dim {call.head_dim}, not a multiple of {HEAD_DIM_OF_TRAINING}"
    return kernels_unsupported_reason(call.device.type, call.dtype)


def _c_pages(call: AttentionCall) -> str | None:
    if not call.page_size:
        return "keys outside pages"
    if call.prefix:
        return "a bidirectional prefix"
    if call.gradients:
        return "gradients"
    if call.key_format != call.value_format:
        return "keys and values of different formats"
    if call.head_dim % KEYS_PER_BLOCK:
        return f"head_dim {call.head_dim}, not a multiple of {KEYS_PER_BLOCK}"
    if call.page_size % KEYS_PER_BLOCK:
        return f"pages of {call.page_size} tokens, not a multiple of {KEYS_PER_BLOCK}"
    if not call.addressable:
        return "pages or a page table that C code cannot read in place"
    if isinstance(call.key_format, str):
        return kernels_unsupported_reason(call.device.type, call.dtype)
    return kernels_unsupported_reason(call.device.type, call.dtype, call.key_format)


def _flash(call: AttentionCall) -> str | None:
    if call.device.type != "cuda":
        return "a device other than a CUDA GPU"
    if call.prefix:
        return "a bidirectional prefix"
    if call.captured:
        return "lengths that are tensors of a CUDA graph"
    if call.page_size and not call.rule.causal:
        return "no causal mask over pages"
    if call.dtype not in FLASH_DTYPES:
        return f"{call.dtype}, not bf16 or fp16"
    if not call.dtype == call.key_format == call.value_format:
        return "queries, keys and values of different dtypes"
    if call.head_dim > MAX_FLASH_HEAD_DIM or call.head_dim % 8:
        return f"head_dim {call.head_dim}, not a multiple of 8 up to {MAX_FLASH_HEAD_DIM}"
    if _capability(call.device) < AMPERE:
        return f"a GPU of compute capability below {AMPERE}.0"
    return None


@lru_cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _triton_pages(call: AttentionCall) -> str | None:
    if not call.captured:
        return "a pass outside a captured decoding step"
    if not call.page_size:
        return "keys outside pages"
    if call.prefix:
        return "a bidirectional prefix"
    if call.gradients:
        return "gradients"
    if isinstance(call.key_format, str) or isinstance(call.value_format, str):
        return "quantized keys and values"
    return triton_dtype_unsupported_reason(call.device.type, call.dtype)


def _sdpa(call: AttentionCall) -> str | None:
    return "lengths that are tensors of a CUDA graph" if call.captured else None


C_TRAINING = AttentionBackend("the C kernels for training", _plain_rule, _c_training)
C_PAGES = AttentionBackend("the C kernel for pages", _c_pages_rule, _c_pages)
FLASH = AttentionBackend("FlashAttention", _plain_rule, _flash)
TRITON_PAGES = AttentionBackend("the Triton kernel for pages", _plain_causal_rule, _triton_pages)
SDPA = AttentionBackend("PyTorch's SDPA", _sdpa_rule, _sdpa)
EXPLICIT = AttentionBackend("explicit attention", _no_reason, _no_reason)

PACKED_BACKENDS = (C_TRAINING, FLASH, SDPA, EXPLICIT)
"""Backends of `attention`, in order of preference."""
PAGED_BACKENDS = (C_PAGES, TRITON_PAGES, FLASH, SDPA, EXPLICIT)
"""Backends of `paged_attention` and of captured decoding steps, in order of preference; SDPA and
explicit attention gather the keys of one sequence at a time."""
