"""AdamW with int8 states: error bounds, unbiased rounding, fused update."""

import math

import pytest
import torch

from easyllm.train import adamw_int8, update_rules
from easyllm.train.adamw_int8 import (
    dequantize_positive,
    dequantize_signed,
    dither,
    quantize_positive,
    quantize_signed,
)
from easyllm.train.optim import MasterOptimizer
from easyllm.train.optim_config import AdamWConfig
from optimizer_parameters import (
    ADAMW,
    INT8,
    SHAPES,
    assert_same_bits,
    backward,
    make_gradients,
    make_parameters,
)

pytestmark = pytest.mark.usefixtures("two_threads")  # kernels split their work


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
