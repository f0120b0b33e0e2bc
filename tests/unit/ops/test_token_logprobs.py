"""Log-probabilities of targets in chunks: values and gradients of the plain formula."""

import pytest
import torch
from torch.nn import functional as F

from easyllm.ops.token_logprobs import linear_logprobs


def inputs(count=37, dim=16, vocab=90, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, dim, generator=generator).to(dtype)
    weight = (0.5 * torch.randn(vocab, dim, generator=generator)).to(dtype)
    targets = torch.randint(0, vocab, (count,), generator=generator)
    return hidden, weight, targets, torch.randn(count, generator=generator)


def plain(hidden, weight, targets, softcap=None):
    logits = hidden.float() @ weight.float().T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return -F.cross_entropy(logits, targets, reduction="none")


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("trains_weight", [False, True])
@pytest.mark.parametrize("chunk_rows", [None, 1, 8])
@pytest.mark.usefixtures("kernels_or_plain", "memory_of_nan")
def test_values_and_gradients_equal_the_formula(softcap, trains_weight, chunk_rows):
    hidden, weight, targets, factors = inputs()
    hidden.requires_grad_(True)
    weight.requires_grad_(trains_weight)
    wanted = (hidden, weight) if trains_weight else (hidden,)
    found = linear_logprobs(hidden, weight, targets, softcap=softcap, chunk_rows=chunk_rows)
    expected = plain(hidden, weight, targets, softcap)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    # a nonlinear function of the values, so that each token has another weight
    got = torch.autograd.grad((found * factors).sum().tanh(), wanted)
    right = torch.autograd.grad((expected * factors).sum().tanh(), wanted)
    for a, b in zip(got, right, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_bf16_rows_are_padded_without_effect():
    hidden, weight, targets, factors = inputs(dtype=torch.bfloat16)
    hidden.requires_grad_(True)
    found = linear_logprobs(hidden, weight, targets)
    expected = plain(hidden, weight, targets)
    assert (found.shape, found.dtype) == (expected.shape, torch.float32)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.02)
    got = torch.autograd.grad((found * factors).sum(), hidden)[0]
    right = torch.autograd.grad((expected * factors).sum(), hidden)[0]
    torch.testing.assert_close(got, right, atol=0.05, rtol=0.05)


def test_no_token_and_no_gradient():
    hidden, weight, _, _ = inputs()
    none = torch.empty(0, dtype=torch.int64)
    found = linear_logprobs(hidden[:0].requires_grad_(True), weight, none)
    found.sum().backward()
    assert found.shape == (0,)
    assert not linear_logprobs(hidden, weight, none.new_zeros(37)).requires_grad
