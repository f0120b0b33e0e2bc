"""Optimizers: arithmetic as in PyTorch, fp32 masters, gradients, checkpoints."""

import gc
import math
import weakref

import pytest
import torch
from torch import nn

from easyllm.batches.packing import pack
from easyllm.checkpoint.store import read_tensors, write_tensors
from easyllm.core.errors import CheckpointError
from easyllm.examples.sample import Sample
from easyllm.train import adamw_int8, update_rules
from easyllm.train.objectives import LanguageModel
from easyllm.train.optim import MasterOptimizer
from easyllm.train.optim_config import AdamWConfig, MuonConfig, SGDConfig
from optimizer_parameters import (
    ADAMW,
    INT8,
    SHAPES,
    assert_same_bits,
    backward,
    make_gradients,
    make_parameters,
)
from tiny_models import build_tiny

pytestmark = pytest.mark.usefixtures("two_threads")  # kernels split their work

MUON = MuonConfig(learning_rate=1e-2, weight_decay=0.1, others=ADAMW)


MUON_INT8 = MuonConfig(learning_rate=1e-2, nesterov=False, others=INT8)


SGD = SGDConfig(learning_rate=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1)


EVERY = {"adamw": ADAMW, "int8": INT8, "muon": MUON, "muon_int8": MUON_INT8, "sgd": SGD}


def twins(parameters):
    """Returns the same parameters for PyTorch's optimizers: matrices, and the rest."""
    copies = {name: nn.Parameter(p.detach().float().clone()) for name, p in parameters.items()}
    return (
        copies,
        [p for p in copies.values() if p.ndim > 1],
        [p for p in copies.values() if p.ndim < 2],
    )


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
    """A reference from its hooks, which are on parameters, would be a cycle nobody collects."""
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
