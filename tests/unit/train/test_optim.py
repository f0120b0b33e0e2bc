"""Optimizers and parameter groups: arithmetic as in PyTorch, masters, checkpoints, patterns."""

import gc
import math
import weakref

import pytest
import torch
from torch import nn

from conftest import build_tiny
from easyllm.batches.packing import pack
from easyllm.checkpoint.store import read_tensors, write_tensors
from easyllm.core.errors import CheckpointError, ConfigError
from easyllm.examples.sample import Sample
from easyllm.train import adamw_int8, update_rules
from easyllm.train.adamw_int8 import (
    dequantize_positive,
    dequantize_signed,
    dither,
    quantize_positive,
    quantize_signed,
)
from easyllm.train.muon import orthogonalise
from easyllm.train.objectives import LanguageModel
from easyllm.train.optim import MasterOptimizer
from easyllm.train.optim_config import AdamWConfig, MuonConfig, ParameterGroup, SGDConfig
from easyllm.train.parameter_groups import build_groups

ADAMW = AdamWConfig(learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
INT8 = AdamWConfig(learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1, state="int8")
MUON = MuonConfig(learning_rate=1e-2, weight_decay=0.1, others=ADAMW)
MUON_INT8 = MuonConfig(learning_rate=1e-2, nesterov=False, others=INT8)
SGD = SGDConfig(learning_rate=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1)
EVERY = {"adamw": ADAMW, "int8": INT8, "muon": MUON, "muon_int8": MUON_INT8, "sgd": SGD}
SHAPES = {
    "embed_tokens.weight": (100, 48),
    "layers.0.mixer.q_proj.weight": (48, 48),
    "layers.0.mixer.q_proj.bias": (48,),
    "layers.0.mixer.position.bias_table": (32, 4),
    "layers.0.feed_forward.up_proj.weight": (96, 48),
    "layers.0.feed_forward.down_proj.weight": (48, 96),
    "norm.weight": (48,),
    "lm_head.weight": (100, 48),
}


def make_parameters(dtype=torch.float32, shapes=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in (shapes or SHAPES).items()
    }


def make_gradients(parameters, seed, size=1.0):
    """Returns gradients that are exact in bf16, so that every dtype sees the same values."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(p.shape, generator=generator) * size).bfloat16().float()
        for name, p in parameters.items()
    }


def backward(parameters, gradients):
    """Sets each parameter's gradient the way a micro-batch does."""
    sum((p * gradients[name].to(p.dtype)).sum() for name, p in parameters.items()).backward()


def twins(parameters):
    """Returns the same parameters for PyTorch's optimizers: matrices, and the rest."""
    copies = {name: nn.Parameter(p.detach().float().clone()) for name, p in parameters.items()}
    return (
        copies,
        [p for p in copies.values() if p.ndim > 1],
        [p for p in copies.values() if p.ndim < 2],
    )


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# ---- AdamW and SGD equal PyTorch's


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_is_bitwise_identical_to_torchs_on_the_masters(dtype):
    shapes = SHAPES | {"layers.1.wide.weight": (update_rules.PIECE // 64 + 3, 129)}  # three pieces
    parameters = make_parameters(dtype, shapes)
    copies, matrices, others = twins(parameters)
    theirs = torch.optim.AdamW(
        [{"params": matrices}, {"params": others, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        fused=True,
    )
    ours = MasterOptimizer(parameters, ADAMW)
    for step in range(4):
        gradients = make_gradients(parameters, step)
        backward(parameters, gradients)
        for name, p in copies.items():
            p.grad = gradients[name].clone()
        for group in theirs.param_groups:
            group["lr"] = 1e-2 * (1 - step / 8)
        theirs.step()
        ours.step(1 - step / 8)
    assert_same_bits(ours.masters, copies)
    assert_same_bits(parameters, {name: p.to(dtype) for name, p in copies.items()})


def test_adamw_agrees_with_the_equations_in_double_precision():
    parameters = {"w.weight": nn.Parameter(torch.randn(5, 7, dtype=torch.float64))}
    value = parameters["w.weight"].detach().clone()
    ours = MasterOptimizer(parameters, ADAMW)
    m, v = torch.zeros_like(value), torch.zeros_like(value)
    for t in range(1, 6):
        gradient = torch.randn(5, 7, dtype=torch.float64)
        parameters["w.weight"].grad = gradient.clone()
        ours.step(0.5)
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        value = value - 0.5e-2 * 0.1 * value
        value = value - 0.5e-2 * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
    torch.testing.assert_close(parameters["w.weight"].detach(), value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("momentum", "nesterov", "decay"),
    [(0.0, False, 0.0), (0.0, False, 0.1), (0.9, False, 0.0), (0.9, False, 0.1), (0.9, True, 0.1)],
)
def test_sgd_is_bitwise_identical_to_torchs(momentum, nesterov, decay):
    parameters = make_parameters()
    copies, matrices, others = twins(parameters)
    theirs = torch.optim.SGD(
        [{"params": matrices, "weight_decay": decay}, {"params": others}],
        lr=1e-2,
        momentum=momentum,
        nesterov=nesterov,
        foreach=False,
    )
    config = SGDConfig(learning_rate=1e-2, momentum=momentum, nesterov=nesterov, weight_decay=decay)
    ours = MasterOptimizer(parameters, config)
    for step in range(4):
        gradients = make_gradients(parameters, step)
        backward(parameters, gradients)
        for name, p in copies.items():
            p.grad = gradients[name].clone()
        theirs.step()
        ours.step(1.0)
    assert_same_bits(parameters, copies)


@pytest.mark.parametrize("name", EVERY)
def test_results_are_bitwise_independent_of_the_piece_size(name, monkeypatch):
    def run():
        parameters = make_parameters(torch.bfloat16)
        optimizer = MasterOptimizer(parameters, EVERY[name])
        for step in range(3):
            backward(parameters, make_gradients(parameters, step))
            optimizer.scale_gradients(0.3)
            optimizer.step(1.0)
        return optimizer.tensors()

    whole = run()
    monkeypatch.setattr(update_rules, "PIECE", adamw_int8.BLOCK)
    assert_same_bits(run(), whole)


# ---- gradients: sums, norm, clipping, scaling, skipping


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_many_micro_batches_are_summed_in_fp32(dtype):
    parameters = make_parameters(dtype)
    optimizer = MasterOptimizer(parameters, ADAMW)
    parts = [make_gradients(parameters, seed, size=10.0**-seed) for seed in range(3)]
    for gradients in parts:
        backward(parameters, gradients)
        assert all(p.grad is None for p in parameters.values())
    for name, found in optimizer.gradients().items():
        expected = parts[0][name].to(dtype).float()
        for gradients in parts[1:]:
            expected = expected + gradients[name].to(dtype).float()
        assert found.dtype == torch.float32
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_and_its_state_are_freed_with_the_run(dtype):
    """Its hooks are on parameters: a reference from them to it would be a cycle that nothing collects."""
    parameters = make_parameters(dtype)
    optimizer = MasterOptimizer(parameters, ADAMW)
    for parameter in parameters.values():
        parameter.sum().backward()
    optimizer.step(1.0)
    dead = weakref.ref(optimizer), weakref.ref(parameters["norm.weight"])
    del optimizer, parameters, parameter
    gc.collect()
    assert [reference() for reference in dead] == [None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_clipping_equal_torchs(dtype):
    parameters = make_parameters(dtype)
    optimizer = MasterOptimizer(parameters, ADAMW)
    gradients = make_gradients(parameters, 5)
    copies, _, _ = twins(parameters)
    for name, p in copies.items():
        p.grad = gradients[name].clone()
    for max_norm in (1e9, 0.5):
        expected = torch.nn.utils.clip_grad_norm_(copies.values(), max_norm).item()
        if max_norm == 1e9:
            backward(parameters, gradients)
        norm = optimizer.grad_norm()
        assert norm == pytest.approx(expected, rel=1e-6)
        optimizer.clip(norm, max_norm)
        for name, found in optimizer.gradients().items():
            torch.testing.assert_close(found, copies[name].grad, rtol=1e-6, atol=0)
    assert optimizer.grad_norm() == pytest.approx(0.5, rel=1e-5)


def test_a_gradient_within_the_limit_is_unchanged():
    parameters = make_parameters()
    optimizer = MasterOptimizer(parameters, ADAMW)
    gradients = make_gradients(parameters, 5)
    backward(parameters, gradients)
    optimizer.clip(optimizer.grad_norm(), 1e6)
    assert_same_bits(optimizer.gradients(), gradients)


def test_an_unscaled_scaled_loss_gives_the_same_update():
    def run(scale):
        parameters = make_parameters(torch.float16)
        optimizer = MasterOptimizer(parameters, ADAMW)
        for step in range(3):
            gradients = make_gradients(parameters, step)
            gradients = {n: (g * 64).round() / 64 for n, g in gradients.items()}  # exact in fp16
            backward(parameters, {name: g * scale for name, g in gradients.items()})
            optimizer.scale_gradients(1 / scale)
            norm = optimizer.grad_norm()
            optimizer.clip(norm, 0.1)
            optimizer.step(1.0)
        return optimizer.tensors() | {"norm": torch.tensor(norm)}

    assert_same_bits(run(2.0**8), run(1.0))


def test_an_overflow_is_visible_in_the_norm_and_a_cleared_step_has_no_effect():
    def run(overflow):
        parameters = make_parameters(torch.float16)
        optimizer = MasterOptimizer(parameters, ADAMW)
        for step in range(3):
            if overflow and step == 1:
                backward(parameters, {n: torch.full(s, 1e38) for n, s in SHAPES.items()})
                assert not math.isfinite(optimizer.grad_norm())
                optimizer.scale_gradients(1 / 8)
                optimizer.clear()
                assert optimizer.grad_norm() == 0
            backward(parameters, make_gradients(parameters, step))
            optimizer.step(1.0)
        return optimizer.tensors()

    assert_same_bits(run(True), run(False))


def test_a_parameter_without_gradient_is_not_updated():
    parameters = make_parameters(torch.bfloat16)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = MasterOptimizer(parameters, ADAMW)
    gradients = make_gradients(parameters, 0)
    used = {"norm.weight": parameters["norm.weight"]}
    backward(used, gradients)
    optimizer.step(1.0)
    for name, p in parameters.items():
        assert torch.equal(p, before[name]) == (name != "norm.weight"), name


def test_given_masters_are_updated_and_returned():
    masters = {name: p.detach() for name, p in make_parameters().items()}
    parameters = {name: nn.Parameter(p.bfloat16()) for name, p in masters.items()}
    optimizer = MasterOptimizer(parameters, ADAMW, masters=masters)
    assert_same_bits(optimizer.final_state(), masters)
    backward(parameters, make_gradients(parameters, 0))
    optimizer.step(1.0)
    final = optimizer.final_state()
    assert {value.dtype for value in final.values()} == {torch.float32}
    assert_same_bits(parameters, {name: value.bfloat16() for name, value in final.items()})


# ---- checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EVERY)
def test_a_saved_optimizer_resumes_bitwise_exactly(name, dtype, tmp_path):
    def steps(parameters, optimizer, numbers):
        for step in numbers:
            for micro in range(1 + step % 2):
                backward(parameters, make_gradients(parameters, 10 * step + micro))
            optimizer.clip(optimizer.grad_norm(), 1.0)
            optimizer.step(1 - step / 10)

    whole = make_parameters(dtype)
    undisturbed = MasterOptimizer(whole, EVERY[name])
    steps(whole, undisturbed, range(7))

    first = make_parameters(dtype)
    saved = MasterOptimizer(first, EVERY[name])
    steps(first, saved, range(4))
    write_tensors(tmp_path / "state.safetensors", saved.tensors())

    second = make_parameters(dtype, seed=99)
    resumed = MasterOptimizer(second, EVERY[name])
    resumed.load_tensors(read_tensors(tmp_path / "state.safetensors")[0])
    assert_same_bits(second, first)
    steps(second, resumed, range(4, 7))
    assert_same_bits(resumed.tensors(), undisturbed.tensors())
    assert_same_bits(second, whole)


@pytest.mark.parametrize(("mine", "theirs"), [("int8", "adamw"), ("sgd", "muon"), ("adamw", "sgd")])
def test_the_state_of_another_optimizer_is_refused_without_changes(mine, theirs):
    parameters = make_parameters()
    optimizer = MasterOptimizer(parameters, EVERY[mine])
    before = {key: value.clone() for key, value in optimizer.tensors().items()}
    other = MasterOptimizer(make_parameters(seed=1), EVERY[theirs]).tensors()
    with pytest.raises(CheckpointError, match=r"does not fit: .* is .* there and .* here"):
        optimizer.load_tensors(other)
    assert_same_bits(optimizer.tensors(), before)


# ---- Muon


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


# ---- AdamW with int8 states


def test_codes_are_within_their_error_bound():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1000, generator=generator) * 10.0 ** torch.randint(
        -12, 3, (1000,), generator=generator
    )
    for step in range(5):
        offset = dither(torch.tensor(float(step)))
        assert offset.min() >= 0
        assert offset.max() < 1
        codes, scales = quantize_signed(values, offset)
        found = dequantize_signed(codes, scales)
        largest = scales.repeat_interleave(256)[:1000]
        root = (found.abs() / largest).sqrt() - (values.abs() / largest).sqrt()
        assert root.abs().max() <= 1 / 127 + 1e-6  # a code is off by at most one
        assert ((found == 0) | (found.sign() == values.sign())).all()
        squares = values.square()
        codes, scales = quantize_positive(squares, offset)
        found = dequantize_positive(codes, scales)
        largest = scales.repeat_interleave(256)[:1000]
        root = (found / largest) ** 0.25 - (squares / largest) ** 0.25
        assert root.abs().max() <= 1 / 255 + 1e-6
        assert (
            found.min() > 0
        )  # a second moment never becomes 0, however small relative to its block's maximum


def test_a_block_of_zeros_stays_zero():
    offset = dither(torch.tensor(7.0))
    for quantize, dequantize in (
        (quantize_signed, dequantize_signed),
        (quantize_positive, dequantize_positive),
    ):
        assert not dequantize(*quantize(torch.zeros(300), offset)).any()


@pytest.mark.parametrize("first", [0, 10_000_000])
def test_dithered_codes_are_unbiased_over_the_steps(first):
    values = torch.rand(256, generator=torch.Generator().manual_seed(0)) + 0.01
    steps = [dither(torch.tensor(float(first + t))) for t in range(400)]
    for quantize, dequantize in (
        (quantize_signed, dequantize_signed),
        (quantize_positive, dequantize_positive),
    ):
        mean = torch.stack([dequantize(*quantize(values, u)) for u in steps]).mean(0)
        torch.testing.assert_close(mean, values, rtol=5e-3, atol=2e-4)


def moments_after(config, steps, fall_at):
    """Returns the weight, and second moments of odd columns, whose gradients shrink to a tenth."""
    name = "layers.0.w.weight"
    parameters = make_parameters(shapes={name: (64, 128)})
    optimizer = MasterOptimizer(parameters, config)
    generator = torch.Generator().manual_seed(1)
    sizes = torch.exp(torch.randn(64, 128, generator=generator))
    for step in range(steps):
        noise = torch.randn(64, 128, generator=generator) * sizes
        if step >= fall_at:
            noise[:, 1::2] *= 0.1
        backward(parameters, {name: noise})
        optimizer.step(1.0)
    state = {key.split(".")[0]: value for key, value in optimizer.tensors().items()}
    if config.state == "int8":
        codes = state["exp_avg_sq_codes"]
        second = dequantize_positive(codes, state["exp_avg_sq_scales"]).view(64, 128)
    else:
        second = state["exp_avg_sq"]
    return parameters[name].detach(), second[:, 1::2].flatten()


def test_int8_states_stay_close_to_fp32_ones_for_a_hundred_steps():
    fp32, int8 = (AdamWConfig(learning_rate=1e-3, state=state) for state in ("fp32", "int8"))
    start, _ = moments_after(fp32, 0, 0)
    weight, second = moments_after(fp32, 100, 100)
    found, second_int8 = moments_after(int8, 100, 100)
    moved = weight - start
    assert (found - weight).norm() < 0.1 * moved.norm()
    ratio = second_int8 / second
    assert ratio.median().item() == pytest.approx(1, abs=0.02)
    assert ratio.quantile(0.01) > 0.6
    assert ratio.quantile(0.99) < 1.6


def test_an_int8_second_moment_follows_shrinking_gradients_unlike_with_rounding_to_nearest(
    monkeypatch,
):
    fp32, int8 = (
        AdamWConfig(learning_rate=1e-3, betas=(0.9, 0.995), state=state)
        for state in ("fp32", "int8")
    )
    _, second = moments_after(fp32, 500, 100)
    _, found = moments_after(int8, 500, 100)
    assert (found / second).median().item() == pytest.approx(1, abs=0.05)
    monkeypatch.setattr(adamw_int8, "dither", lambda step: torch.full((256,), 0.5))
    _, nearest = moments_after(int8, 500, 100)
    assert not 0.8 < (nearest / second).median() < 1.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_int8_update_is_bitwise_identical_to_separate_operations(dtype, monkeypatch):
    shapes = {"layers.0.w.weight": (72, 144), "layers.1.w.weight": (64, 100)}  # 40.5 and 25 blocks

    def after_some_steps():
        parameters = make_parameters(dtype, shapes)
        optimizer = MasterOptimizer(parameters, INT8)
        for step in range(5):
            gradients = make_gradients(parameters, step)
            gradients["layers.1.w.weight"][:40] = 0  # blocks that are zero at first
            backward(parameters, gradients)
            optimizer.scale_gradients(0.37)
            optimizer.step(1 - step / 8)
        return optimizer.tensors() | parameters

    one_pass = after_some_steps()
    for module in (adamw_int8, update_rules):
        monkeypatch.setattr(module, "kernels_for", lambda *tensors: None)
    assert_same_bits(one_pass, after_some_steps())


def test_the_gradient_norm_is_accumulated_in_high_precision(monkeypatch):
    parameters = make_parameters(torch.bfloat16)
    optimizer = MasterOptimizer(parameters, ADAMW)
    backward(parameters, make_gradients(parameters, 0))
    exact = math.sqrt(sum(float(g.double().square().sum()) for g in optimizer.gradients().values()))
    norms = [optimizer.grad_norm()]
    monkeypatch.setattr("easyllm.train.optim.kernels_for", lambda *tensors: None)
    norms.append(optimizer.grad_norm())
    assert norms == [pytest.approx(exact, rel=1e-6)] * 2


def test_int8_states_take_one_byte_per_moment_and_small_tensors_keep_fp32():
    optimizer = MasterOptimizer(make_parameters(), INT8)
    tensors = optimizer.tensors()
    count = math.prod(SHAPES["embed_tokens.weight"])
    state = [t for key, t in tensors.items() if key.startswith("exp_avg")]
    large = [t for key, t in tensors.items() if key.endswith("codes.embed_tokens.weight")]
    assert [t.numel() * t.element_size() for t in large] == [count, count]
    assert tensors["exp_avg_scales.embed_tokens.weight"].numel() == -(-count // 256)
    assert tensors["exp_avg.layers.0.mixer.q_proj.weight"].dtype == torch.float32
    assert sum(t.numel() * t.element_size() for t in state) < 0.4 * sum(
        8 * math.prod(shape) for shape in SHAPES.values()
    )


# ---- parameter groups


def test_matrices_decay_and_norms_and_biases_do_not():
    groups = build_groups(make_parameters(), AdamWConfig(weight_decay=0.1))
    decay = {name: group.weight_decay for group in groups for name in group.names}
    assert decay == {name: 0.1 if len(shape) > 1 else 0.0 for name, shape in SHAPES.items()}


def test_the_first_matching_pattern_applies():
    patterns = [
        ParameterGroup(pattern=r"q_proj\.bias$", weight_decay=0.5),
        ParameterGroup(pattern="mixer", rate_factor=0.1),
        ParameterGroup(pattern="proj", rate_factor=3.0),
    ]
    groups = build_groups(make_parameters(), AdamWConfig(weight_decay=0.1), patterns)
    found = {name: (g.rate_factor, g.weight_decay) for g in groups for name in g.names}
    assert found == {
        "embed_tokens.weight": (1.0, 0.1),
        "layers.0.mixer.q_proj.weight": (0.1, 0.1),
        "layers.0.mixer.q_proj.bias": (1.0, 0.5),
        "layers.0.mixer.position.bias_table": (0.1, 0.1),
        "layers.0.feed_forward.up_proj.weight": (3.0, 0.1),
        "layers.0.feed_forward.down_proj.weight": (3.0, 0.1),
        "norm.weight": (1.0, 0.0),
        "lm_head.weight": (1.0, 0.1),
    }


def test_a_group_has_its_own_rate_and_decay():
    patterns = [ParameterGroup(pattern="lm_head", rate_factor=0.25, weight_decay=0.5)]
    config = SGDConfig(learning_rate=0.1)
    parameters = make_parameters()
    start = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = MasterOptimizer(parameters, config, patterns)
    gradients = make_gradients(parameters, 0)
    backward(parameters, gradients)
    optimizer.step(0.5)
    for name, p in parameters.items():
        head = name == "lm_head.weight"
        descent = gradients[name] + (0.5 * start[name] if head else 0)
        expected = start[name] - (0.0125 if head else 0.05) * descent
        torch.testing.assert_close(p.detach(), expected)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("lm_haed", "matches no trained parameter; the closest names are lm_head.weight"),
        ("layers.0.mixer.(", "not a regular expression"),
    ],
)
def test_an_invalid_pattern_is_a_helpful_error(pattern, words):
    with pytest.raises(ConfigError, match=words) as error:
        build_groups(make_parameters(), ADAMW, [ParameterGroup(pattern=pattern)])
    assert repr(pattern) in str(error.value)


def test_a_pattern_shadowed_by_earlier_ones_is_an_error():
    patterns = [ParameterGroup(pattern="layers"), ParameterGroup(pattern="q_proj")]
    with pytest.raises(
        ConfigError, match=r"parameter_groups\.1\.pattern.*more specific pattern first"
    ):
        build_groups(make_parameters(), ADAMW, patterns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rate_factor_0_freezes(dtype):
    patterns = [ParameterGroup(pattern="embed|lm_head", rate_factor=0.0)]
    masters = {name: p.detach() for name, p in make_parameters().items()}
    parameters = {name: nn.Parameter(p.clone().to(dtype)) for name, p in masters.items()}
    given = {name: p.clone() for name, p in masters.items()}
    optimizer = MasterOptimizer(parameters, ADAMW, patterns, given)
    frozen = {"embed_tokens.weight", "lm_head.weight"}
    assert {name for name, p in parameters.items() if not p.requires_grad} == frozen
    backward(parameters, make_gradients(parameters, 0))
    gradients = make_gradients(parameters, 0)
    norm = math.sqrt(sum(g.square().sum() for n, g in gradients.items() if n not in frozen))
    assert optimizer.grad_norm() == pytest.approx(norm, rel=1e-5)
    optimizer.step(1.0)
    for name, p in parameters.items():
        assert torch.equal(p, masters[name].to(dtype)) == (name in frozen)
    assert not any(name in key for key in optimizer.tensors() for name in frozen)
    if dtype == torch.bfloat16:  # the result contains the given fp32 value, not its bf16 rounding
        final = optimizer.final_state()
        assert final.keys() == parameters.keys()
        assert torch.equal(final["lm_head.weight"], masters["lm_head.weight"])


def test_freezing_everything_is_an_error():
    with pytest.raises(ConfigError, match="nothing is left to train"):
        MasterOptimizer(make_parameters(), ADAMW, [ParameterGroup(pattern=".", rate_factor=0)])


def test_rates_name_every_group_with_a_separate_rate():
    patterns = [
        ParameterGroup(pattern="q_proj", rate_factor=0.1),
        ParameterGroup(pattern="norm", weight_decay=0.1),
        ParameterGroup(pattern="embed", rate_factor=0.0),
    ]
    config = MuonConfig(learning_rate=1e-2, others=AdamWConfig(learning_rate=1e-3))
    rates = MasterOptimizer(make_parameters(), config, patterns).rates(0.5)
    assert rates == pytest.approx(
        {
            "learning_rate": 5e-3,
            "learning_rate/q_proj": 5e-4,
            "learning_rate/q_proj others": 5e-5,
            "learning_rate/others": 5e-4,
        }
    )
    assert MasterOptimizer(make_parameters(), ADAMW).rates(0.5) == {"learning_rate": 5e-3}


# ---- training


def losses(config, dtype=torch.float32, steps=30):
    """Returns the loss of a tiny model on one batch before each step."""
    model = build_tiny(seed=3, hidden_size=64, intermediate_size=128).to(dtype)
    model.requires_grad_(True)
    optimizer = MasterOptimizer(dict(model.named_parameters()), config)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 320, (3, 25), generator=generator).tolist()
    batch, found = pack([Sample.from_mask(row) for row in ids]), []
    for step in range(steps):
        output = LanguageModel().loss(model, batch)
        (output.sum / output.num_tokens).backward()
        optimizer.clip(optimizer.grad_norm(), 1.0)
        optimizer.step(1 - step / steps)
        found.append(output.sum.item() / output.num_tokens)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        AdamWConfig(learning_rate=1e-2),
        MuonConfig(learning_rate=3e-2, others=AdamWConfig(learning_rate=1e-2)),
        SGDConfig(learning_rate=0.3, momentum=0.9),
    ],
    ids=lambda config: config.kind,
)
def test_every_optimizer_trains_a_tiny_model(config, dtype):
    found = losses(config, dtype)
    assert found[0] > 5
    assert found[-1] < 0.5 * found[0]


def test_int8_states_train_a_tiny_model_as_far_as_fp32_ones():
    fp32, int8 = (losses(AdamWConfig(learning_rate=1e-2, state=s)) for s in ("fp32", "int8"))
    assert int8 != fp32
    assert int8 == pytest.approx(fp32, abs=0.1)
