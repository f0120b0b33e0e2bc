"""Muon: its orthogonalised update, and which matrices it updates."""

import pytest
import torch
from torch import nn

from easyllm.core.errors import ConfigError
from easyllm.train.muon import orthogonalise
from easyllm.train.optim import MasterOptimizer
from easyllm.train.optim_config import AdamWConfig, MuonConfig
from easyllm.train.parameter_groups import build_groups
from optimizer_parameters import backward, make_gradients, make_parameters


def polar(matrix):
    """U Vᵀ, the nearest orthogonal matrix."""
    u, _, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (48, 96), (96, 48), (7, 200), (1, 30)])
def test_the_update_has_singular_values_near_1_and_the_polar_factors_direction(shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    matrix = torch.randn(shape, generator=generator)
    if (
        shape[0] == shape[1]
    ):  # square Gaussian matrices have singular values near 0, which five steps do not raise to 1
        matrix += 2 * torch.eye(64) * matrix.norm() / 8
    found = orthogonalise(matrix, 5, dtype).double()
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.67
    assert values.max() < 1.21
    expected = polar(matrix)
    cosine = (found * expected).sum() / found.norm() / expected.norm()
    assert cosine > 0.98
    u, _, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    turned = u.T @ found @ v.T  # diagonal if the singular vectors are the same
    off = turned - torch.diag(torch.diagonal(turned))
    assert off.abs().max() < (1e-4 if dtype == torch.float32 else 5e-2)


def test_five_steps_raise_small_singular_values_by_the_scalar_quintic():
    generator = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(6, 6, generator=generator))
    values = torch.tensor([1.0, 0.5, 0.1, 0.03, 0.01, 0.004])
    found = orthogonalise(u @ torch.diag(values) @ v, 5, torch.float32)
    x = values.double() / values.double().norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    expected = u.double() @ torch.diag(x) @ v.double()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
    assert 0.6 < x.min() < x.max() < 1.21


def test_the_update_is_independent_of_the_gradient_scale_and_zero_stays_zero():
    matrix = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    whole = orthogonalise(matrix, 5, torch.float32)
    for size in (1e-10, 1e10):
        torch.testing.assert_close(
            orthogonalise(matrix * size, 5, torch.float32), whole, rtol=1e-4, atol=1e-5
        )
    assert not orthogonalise(torch.zeros(4, 5), 5).any()


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_updates_a_matrix_like_torchs(nesterov):
    name = "layers.0.feed_forward.up_proj.weight"
    parameters = make_parameters(shapes={name: (96, 48)})
    twin = nn.Parameter(parameters[name].detach().clone())
    start = twin.detach().clone()
    theirs = torch.optim.Muon(
        [twin],
        lr=1e-2,
        weight_decay=0.1,
        momentum=0.9,
        nesterov=nesterov,
        adjust_lr_fn="match_rms_adamw",
    )
    config = MuonConfig(learning_rate=1e-2, weight_decay=0.1, momentum=0.9, nesterov=nesterov)
    ours = MasterOptimizer(parameters, config)
    for step in range(5):
        gradients = make_gradients(parameters, step)
        backward(parameters, gradients)
        twin.grad = gradients[name].clone()
        theirs.step()
        ours.step(1.0)
    moved, expected = parameters[name].detach() - start, twin.detach() - start
    assert (moved - expected).norm() < 0.01 * expected.norm()  # PyTorch computes in bf16


def test_a_muon_update_has_the_rms_of_an_adamw_update():
    name = "layers.0.w.weight"
    for shape in ((64, 64), (96, 48), (48, 96)):
        parameters = make_parameters(shapes={name: shape})
        start = parameters[name].detach().clone()
        optimizer = MasterOptimizer(parameters, MuonConfig(learning_rate=0.5))
        backward(parameters, make_gradients(parameters, 0))
        optimizer.step(1.0)
        rms = ((parameters[name].detach() - start) / 0.5).square().mean().sqrt().item()
        assert rms == pytest.approx(0.2, rel=0.2)


def test_muon_updates_the_matrices_inside_the_layers_and_adamw_the_rest():
    config = MuonConfig(weight_decay=0.3, others=AdamWConfig(weight_decay=0.2))
    groups = build_groups(make_parameters(), config)
    assert {(g.rule.kind, g.weight_decay): g.names for g in groups} == {
        ("muon", 0.3): (
            "layers.0.mixer.q_proj.weight",
            "layers.0.feed_forward.up_proj.weight",
            "layers.0.feed_forward.down_proj.weight",
        ),
        ("adamw", 0.2): (
            "embed_tokens.weight",
            "layers.0.mixer.position.bias_table",
            "lm_head.weight",
        ),
        ("adamw", 0.0): ("layers.0.mixer.q_proj.bias", "norm.weight"),
    }


def test_muon_without_a_matrix_is_an_error():
    with pytest.raises(ConfigError, match="muon finds no matrix inside the layers"):
        MasterOptimizer(make_parameters(shapes={"embed_tokens.weight": (4, 4)}), MuonConfig())
