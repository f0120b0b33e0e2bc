"""Attention backends: their reasons against a call, and which backend is picked for it."""

import pytest
import torch

from easyllm.ops import attention_backends, paged_attention
from easyllm.ops.attention_backends import (
    C_PAGES,
    C_TRAINING,
    EXPLICIT,
    FLASH,
    PACKED_BACKENDS,
    PAGED_BACKENDS,
    SDPA,
    TRITON_PAGES,
    AttentionCall,
    pick_backend,
)
from easyllm.ops.attention_rule import AttentionRule, ScoreTerms
from easyllm.ops.gpu import support, triton_unsupported_reason
from easyllm.ops.kernels import build, kernels_for
from easyllm.ops.kernels.build import kernels_unsupported_reason
from easyllm.ops.paged_attention import new_pages, paged_call

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
PLAIN = AttentionRule(scale=1.0)
BIAS = AttentionRule(scale=1.0, terms=ScoreTerms(bias=lambda query, key: query - key))
SCORES = AttentionRule(scale=1.0, terms=ScoreTerms(scores=lambda q, k, query, key: q @ k.mT))
CAPPED = AttentionRule(scale=1.0, softcap=30.0)
SINKS = AttentionRule(scale=1.0, window=8, num_sinks=2)
WINDOW = AttentionRule(scale=1.0, window=8)
BOTH_WAYS = AttentionRule(scale=1.0, causal=False)
BY_HEAD = AttentionRule(scale=1.0, causal=False, directions=("forward", "backward"))
BOTH_WAYS_WINDOW = AttentionRule(scale=1.0, causal=False, window=8)


@pytest.fixture(autouse=True)
def _both_machines(monkeypatch):
    """Makes every backend available: C kernels, Triton and a recent GPU."""
    monkeypatch.setattr(build, "_library", lambda: object())
    monkeypatch.setattr(support, "_has_triton", lambda: True)
    monkeypatch.setattr(attention_backends, "_capability", lambda device: 9)


def call(rule=PLAIN, device=CPU, dtype=FP32, head_dim=64, **rest):
    formats = {"key_format": dtype, "value_format": dtype} | rest
    return AttentionCall(rule, device, dtype, head_dim=head_dim, **formats)


def supported(backend, **changes):
    """Returns a call that the backend supports, with changes."""
    given = {
        C_TRAINING: {"gradients": True},
        C_PAGES: {"page_size": 16},
        FLASH: {"device": GPU, "dtype": BF16},
        TRITON_PAGES: {"device": GPU, "page_size": 16, "captured": True},
        SDPA: {},
        EXPLICIT: {"rule": SCORES},
    }[backend]
    return call(**(given | changes))


BACKENDS = {backend.name: backend for backend in (*PACKED_BACKENDS, *PAGED_BACKENDS)}
REASONS = [
    (C_TRAINING, {"rule": CAPPED}, "a soft cap"),
    (C_TRAINING, {"rule": BIAS}, "positions that change the scores"),
    (C_TRAINING, {"rule": SINKS}, "sinks"),
    (C_TRAINING, {"rule": BOTH_WAYS_WINDOW}, "a sliding window without a causal mask"),
    (C_TRAINING, {"gradients": False}, "a forward pass without gradients"),
    (C_TRAINING, {"page_size": 16}, "keys in pages"),
    (C_TRAINING, {"prefix": True}, "a bidirectional prefix"),
    (C_TRAINING, {"key_format": BF16}, "queries, keys and values of different dtypes"),
    (C_TRAINING, {"head_dim": 24}, "head_dim 24, not a multiple of 16"),
    (C_TRAINING, {"dtype": FP16}, "torch.float16, not fp32 or bf16"),
    (C_TRAINING, {"device": GPU}, "a device other than a CPU"),
    (C_PAGES, {"rule": CAPPED}, "a soft cap"),
    (C_PAGES, {"rule": SCORES}, "positions that change the scores"),
    (C_PAGES, {"rule": SINKS}, "sinks"),
    (C_PAGES, {"rule": BOTH_WAYS}, "no causal mask"),
    (C_PAGES, {"page_size": 0}, "keys outside pages"),
    (C_PAGES, {"prefix": True}, "a bidirectional prefix"),
    (C_PAGES, {"gradients": True}, "gradients"),
    (C_PAGES, {"value_format": "int8"}, "keys and values of different formats"),
    (C_PAGES, {"head_dim": 20}, "head_dim 20, not a multiple of 8"),
    (C_PAGES, {"page_size": 12}, "pages of 12 tokens, not a multiple of 8"),
    (C_PAGES, {"addressable": False}, "pages or a page table that C code cannot read in place"),
    (C_PAGES, {"dtype": FP64}, "torch.float64, not fp32 or bf16"),
    (
        C_PAGES,
        {"key_format": FP16, "value_format": FP16},
        "torch.float16, not fp32 or bf16",
    ),
    (C_PAGES, {"device": GPU}, "a device other than a CPU"),
    (FLASH, {"rule": CAPPED}, "a soft cap"),
    (FLASH, {"rule": BIAS}, "positions that change the scores"),
    (FLASH, {"rule": SINKS}, "sinks"),
    (FLASH, {"rule": BOTH_WAYS_WINDOW}, "a sliding window without a causal mask"),
    (FLASH, {"rule": BOTH_WAYS, "page_size": 16}, "no causal mask over pages"),
    (FLASH, {"device": CPU}, "a device other than a CUDA GPU"),
    (FLASH, {"prefix": True}, "a bidirectional prefix"),
    (FLASH, {"captured": True}, "lengths that are tensors of a CUDA graph"),
    (FLASH, {"dtype": FP32}, "torch.float32, not bf16 or fp16"),
    (FLASH, {"key_format": "int8"}, "queries, keys and values of different dtypes"),
    (FLASH, {"head_dim": 12}, "head_dim 12, not a multiple of 8 up to 256"),
    (FLASH, {"head_dim": 264}, "head_dim 264, not a multiple of 8 up to 256"),
    (TRITON_PAGES, {"rule": CAPPED}, "a soft cap"),
    (TRITON_PAGES, {"rule": BIAS}, "positions that change the scores"),
    (TRITON_PAGES, {"rule": SINKS}, "sinks"),
    (TRITON_PAGES, {"rule": BOTH_WAYS}, "no causal mask"),
    (C_TRAINING, {"rule": BY_HEAD}, "heads with directions of their own"),
    (FLASH, {"rule": BY_HEAD}, "heads with directions of their own"),
    (C_PAGES, {"rule": BY_HEAD}, "no causal mask"),
    (TRITON_PAGES, {"captured": False}, "a pass outside a captured decoding step"),
    (TRITON_PAGES, {"page_size": 0}, "keys outside pages"),
    (TRITON_PAGES, {"prefix": True}, "a bidirectional prefix"),
    (TRITON_PAGES, {"gradients": True}, "gradients"),
    (TRITON_PAGES, {"key_format": "int4"}, "quantized keys and values"),
    (TRITON_PAGES, {"device": CPU}, "a device other than a CUDA GPU"),
    (TRITON_PAGES, {"dtype": FP64}, "torch.float64, not fp32, bf16 or fp16"),
    (SDPA, {"rule": CAPPED}, "a soft cap"),
    (SDPA, {"rule": SCORES}, "positions that change the scores other than by a bias"),
    (SDPA, {"captured": True}, "lengths that are tensors of a CUDA graph"),
]


@pytest.mark.parametrize("name", BACKENDS)
def test_a_supported_call_has_no_reason(name):
    assert BACKENDS[name].unsupported_reason(supported(BACKENDS[name])) is None


@pytest.mark.parametrize(
    ("backend", "changes", "reason"), REASONS, ids=lambda x: getattr(x, "name", None)
)
def test_each_unsupported_property_has_its_reason(backend, changes, reason):
    assert backend.unsupported_reason(supported(backend, **changes)) == reason


@pytest.mark.parametrize("backend", [C_TRAINING, C_PAGES, FLASH, TRITON_PAGES])
@pytest.mark.parametrize("rule", [PLAIN, WINDOW])
def test_kernels_support_causal_rules_with_and_without_a_window(backend, rule):
    assert backend.unsupported_reason(supported(backend, rule=rule)) is None


@pytest.mark.parametrize("backend", [C_TRAINING, FLASH])
def test_kernels_for_packed_sequences_support_bidirectional_attention(backend):
    assert backend.unsupported_reason(supported(backend, rule=BOTH_WAYS)) is None


def test_missing_libraries_and_old_gpus_are_reasons(monkeypatch):
    monkeypatch.setattr(build, "_library", lambda: None)
    for backend in (C_TRAINING, C_PAGES):
        assert "no C compiler" in backend.unsupported_reason(supported(backend))
    monkeypatch.setattr(support, "_has_triton", lambda: False)
    assert "no Triton" in TRITON_PAGES.unsupported_reason(supported(TRITON_PAGES))
    monkeypatch.setattr(attention_backends, "_capability", lambda device: 7)
    assert "capability below 8.0" in FLASH.unsupported_reason(supported(FLASH))


def test_c_kernels_are_not_used_while_torch_compile_traces(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for backend in (C_TRAINING, C_PAGES):
        assert backend.unsupported_reason(supported(backend)) == "tracing by torch.compile"


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        (call(gradients=True), C_TRAINING),
        (call(gradients=True, rule=BIAS), SDPA),
        (call(gradients=True, rule=CAPPED), EXPLICIT),
        (call(gradients=True, prefix=True), SDPA),
        (call(), SDPA),
        (call(dtype=FP64), SDPA),
        (call(device=GPU, dtype=BF16, gradients=True), FLASH),
        (call(device=GPU, dtype=BF16), FLASH),
        (call(device=GPU, gradients=True), SDPA),
        (call(device=GPU, dtype=BF16, rule=SCORES), EXPLICIT),
        (call(page_size=16), C_PAGES),
        (call(page_size=16, key_format="int8", value_format="int8"), C_PAGES),
        (call(page_size=16, key_format=BF16, value_format=BF16), C_PAGES),
        (call(page_size=16, rule=SINKS), SDPA),
        (call(page_size=16, rule=CAPPED), EXPLICIT),
        (call(page_size=16, prefix=True), SDPA),
        (call(page_size=16, dtype=FP64), SDPA),
        (call(page_size=16, device=GPU, dtype=BF16), FLASH),
        (call(page_size=16, device=GPU), SDPA),
        (call(page_size=16, device=GPU, captured=True), TRITON_PAGES),
        (call(page_size=16, device=GPU, dtype=BF16, captured=True), TRITON_PAGES),
    ],
)
def test_the_first_backend_without_a_reason_is_picked(described, expected):
    assert pick_backend(described) is expected


def test_a_call_over_pages_is_described_from_its_tensors():
    table = torch.zeros(1, 4, dtype=torch.int32)
    for dtype in (FP32, BF16, "int8", "int4"):
        pages = new_pages((4, 2, 16, 64), dtype)
        found = paged_call(pages, pages, PLAIN, FP32, table=table)
        wanted = call(page_size=16, key_format=dtype, value_format=dtype)
        assert found == wanted
    pages = new_pages((4, 2, 16, 64), FP32)
    for bad in (table.long(), torch.zeros(4, 2, dtype=torch.int32).T):
        assert not paged_call(pages, pages, PLAIN, FP32, table=bad).addressable
    assert not paged_call(pages, pages[:2], PLAIN, FP32, table=table).addressable
    assert not paged_call(pages, pages.mT.contiguous().mT, PLAIN, FP32).addressable


def test_gradients_flow_through_a_call_over_pages():
    q = torch.randn(1, 2, 16, requires_grad=True)
    pages = new_pages((1, 1, 8, 16), FP32).zero_()
    table = torch.zeros(1, 1, dtype=torch.int32)
    out = paged_attention.paged_attention(q, pages, pages, table, (1,), (5,), PLAIN)
    assert out.requires_grad


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64])
def test_the_reason_agrees_with_the_choice_of_c_kernels(dtype):
    x = torch.empty(1, dtype=dtype)
    assert (kernels_unsupported_reason("cpu", dtype) is None) == (kernels_for(x) is not None)


def test_triton_needs_a_gpu():
    assert triton_unsupported_reason(torch.empty(1)) == "a device other than a CUDA GPU"
