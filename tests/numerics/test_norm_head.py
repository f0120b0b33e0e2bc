"""Baichuan 2's head with unit rows and loss on the largest logit, against autograd."""

import torch
from torch.nn import functional as F

from easyllm.nn.norm_head import NormHead, scaled_rows, unit_rows
from easyllm.ops.cross_entropy import linear_cross_entropy


def head_of(dtype=torch.float64):
    head = NormHead(6, 11).to(dtype)
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(head.weight, std=2.0, generator=generator)
    return head


def test_logits_and_gradients_are_those_of_rows_scaled_in_each_pass():
    head, x = head_of(), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    expected = x @ F.normalize(head.weight).T
    torch.testing.assert_close(head(x), expected)
    grads = torch.autograd.grad(head(x).square().sum(), (x, head.weight))
    wanted = torch.autograd.grad(expected.square().sum(), (x, head.weight))
    for ours, theirs in zip(grads, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_without_gradients_the_rows_are_scaled_again_once_the_weight_has_changed():
    head, x = head_of(), torch.randn(5, 6, dtype=torch.float64)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(head(x), x @ F.normalize(head.weight).T)
            assert head.storage.dense() is head.storage.dense()
            head.weight.mul_(torch.linspace(1, 3, 11, dtype=torch.float64)[:, None])
            head.weight[0] += 1


def test_rows_of_unit_length_keep_their_values():
    for dtype in (torch.float32, torch.bfloat16):
        unit = unit_rows(head_of(dtype).weight.detach())
        assert scaled_rows(unit) is unit
    assert scaled_rows(2 * unit) is not unit


def test_the_loss_on_the_largest_logit_and_its_gradient():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(7, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(11, (7,), generator=generator)
    labels[2] = -100
    ours = linear_cross_entropy(hidden, weight, labels, max_z_loss=0.03, chunk_rows=3)
    logits = (hidden @ weight.T)[labels >= 0]
    plain = F.cross_entropy(logits, labels[labels >= 0], reduction="sum")
    expected = plain + 0.03 * logits.max(-1).values.square().sum()
    torch.testing.assert_close(ours.sum, expected)
    grads = torch.autograd.grad(ours.sum, (hidden, weight))
    wanted = torch.autograd.grad(expected, (hidden, weight))
    for mine, theirs in zip(grads, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
