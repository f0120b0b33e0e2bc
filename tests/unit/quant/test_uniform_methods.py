"""RTN, GPTQ and AWQ on uniform grids: bounds, exact special cases, smaller errors."""

import pytest
import torch

from easyllm.core.errors import ConfigError
from easyllm.quant.awq import clipped
from easyllm.quant.gptq import GPTQOptions, gptq
from easyllm.quant.rtn import rtn
from easyllm.quant.spec import QuantSpec
from easyllm.quant.statistics import Statistics, output_error

GROUPS = [None, 16, 32, "tensor"]


def weight(outputs=48, inputs=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(outputs, inputs, generator=generator) * 0.3 + 0.05


def inputs_of(width=64, rows=400, seed=1):
    """Returns correlated inputs [rows, width] whose channels differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    sizes = torch.logspace(-1, 1, width)[torch.randperm(width, generator=generator)]
    return torch.randn(rows, width, generator=generator) @ (torch.eye(width) + mixing) * sizes


def gram_of(x):
    its = Statistics.empty(x.shape[1])
    its.add(x)
    return its.gram


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rtn_errors_are_at_most_half_a_scale(bits, group, symmetric):
    spec = QuantSpec(bits=bits, group_size=group, symmetric=symmetric)
    w = weight()
    found = rtn(w, spec)
    # fp16 rounds a scale by up to 2^-11 of it, which moves the outermost level that many times
    slack = 1 + 2 * spec.levels * 2**-11
    bound = found.scales[:, found.groups()] / 2 * slack
    assert bool(((found.dequantize() - w).abs() <= bound + 1e-7).all())
    assert found.codes.max() <= spec.levels


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_is_on_every_grid_and_a_group_of_zeros_stays_zero(symmetric):
    w = weight()
    w[3], w[5, 16:32], w[7] = 0, 0, w[7].abs() + 1
    found = rtn(w, QuantSpec(bits=4, group_size=16, symmetric=symmetric)).dequantize()
    assert torch.equal(found[3], torch.zeros(64))
    assert torch.equal(found[5, 16:32], torch.zeros(16))
    assert bool(found.isfinite().all())


def test_scales_are_those_of_a_file():
    for dtype in ("float16", "bfloat16"):
        found = rtn(weight(), QuantSpec(bits=4, group_size=32, scale_dtype=dtype))
        assert torch.equal(found.scales.to(getattr(torch, dtype)).float(), found.scales)
        reach = weight().view(48, 2, 32).abs().amax(-1)
        torch.testing.assert_close(found.scales, reach / 7.5, rtol=2**-8, atol=0)


def test_bits_per_weight_count_the_scales():
    assert QuantSpec(bits=4, group_size=128).bits_per_weight(4096) == 4.125
    assert QuantSpec(bits=4, group_size=64, symmetric=False).bits_per_weight(576) == 4 + 20 / 64
    assert QuantSpec(bits=8).bits_per_weight(512) == 8 + 16 / 512


def test_a_group_size_that_does_not_divide_the_width_names_those_that_do():
    reason = QuantSpec(bits=4, group_size=128).unsupported_reason(576)
    assert reason == "a group size of 128 does not divide 576 inputs (those that do: 16, 32, 64)"
    assert QuantSpec(bits=4, group_size=64).unsupported_reason(576) is None


@pytest.mark.parametrize("options", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("group", [None, 16, 32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_with_a_diagonal_hessian_is_rtn(symmetric, group, options):
    act_order, static = options
    spec = QuantSpec(bits=4, group_size=group, symmetric=symmetric)
    w, diagonal = weight(), torch.logspace(-2, 2, 64)
    if act_order and not static and group is not None:
        # groups follow the order of columns then; with falling diagonal values it is the same
        diagonal = diagonal.flip(0)
    options = GPTQOptions(act_order=act_order, static_groups=static, search=False)
    found = gptq(w, diagonal.diag(), spec, options)
    expected = rtn(w, spec)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales, expected.scales)
    assert torch.equal(found.zeros, expected.zeros)
    assert torch.equal(found.dequantize(), expected.dequantize())


@pytest.mark.parametrize("options", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group", [None, 16])
def test_gptq_loses_less_of_the_outputs_than_rtn(group, bits, options):
    spec, w, gram = QuantSpec(bits=bits, group_size=group), weight(), gram_of(inputs_of())
    act_order, static = options
    found = gptq(w, gram, spec, GPTQOptions(act_order=act_order, static_groups=static))
    error = output_error(found.dequantize() - w, gram)
    assert error < 0.8 * output_error(rtn(w, spec).dequantize() - w, gram)


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_searched_ranges_lose_less_of_the_outputs_than_whole_ones(symmetric, bits, static):
    spec = QuantSpec(bits=bits, group_size=16, symmetric=symmetric)
    w, gram = weight(), gram_of(inputs_of())
    errors = [
        output_error(gptq(w, gram, spec, options).dequantize() - w, gram)
        for search in (False, True)
        for options in [GPTQOptions(act_order=static, static_groups=static, search=search)]
    ]
    assert errors[1] < 0.95 * errors[0]


def reference_gptq(w, gram, spec, damping=0.01):
    """One column at a time with the conditional optimum, H⁻¹ reduced by elimination."""
    hessian = gram.double() + damping * gram.double().diagonal().mean() * torch.eye(len(gram))
    inverse, w = torch.linalg.inv(hessian), w.double().clone()
    expected = rtn(w.float(), spec)  # per-channel scales do not change
    scales, zeros = expected.scales[:, 0].double(), expected.zeros[:, 0].double()
    out = torch.zeros_like(w)
    for i in range(w.shape[1]):
        code = (w[:, i] / scales).round().add(zeros).clamp(0, spec.levels)
        out[:, i] = (code - zeros) * scales
        error = (w[:, i] - out[:, i]) / inverse[i, i]
        w -= error[:, None] * inverse[i]
        inverse = inverse - inverse[:, i : i + 1] @ inverse[i : i + 1] / inverse[i, i]
        inverse[i, i] = 1  # a finished column, whose row and column are zero
    return out.float()


def test_gptq_is_the_column_wise_optimum_of_the_paper():
    spec, w, gram = QuantSpec(bits=4), weight(), gram_of(inputs_of())
    found = gptq(w, gram, spec, GPTQOptions(act_order=False, search=False)).dequantize()
    expected = reference_gptq(w, gram, spec)
    assert ((found - expected).abs() > 1e-5).float().mean() < 0.002  # ties of rounding may differ


def test_gptq_with_blocks_is_gptq_without(monkeypatch):
    spec, w, gram = QuantSpec(bits=3, group_size=16), weight(), gram_of(inputs_of())
    found = gptq(w, gram, spec).dequantize()
    monkeypatch.setattr("easyllm.quant.gptq.BLOCK", 16)
    other = gptq(w, gram, spec).dequantize()
    assert ((found - other).abs() > 1e-5).float().mean() < 0.01


def test_gptq_of_inputs_that_never_occur_keeps_their_weights():
    x = inputs_of()
    x[:, 10:14] = 0
    spec, w = QuantSpec(bits=8), weight()
    found = gptq(w, gram_of(x), spec, GPTQOptions(search=False)).dequantize()
    expected = rtn(w, spec).dequantize()
    assert torch.equal(found[:, 10:14], expected[:, 10:14])


def test_gptq_of_few_rows_is_damped():
    found = gptq(weight(), gram_of(inputs_of(rows=3)), QuantSpec(bits=4), GPTQOptions(damping=0))
    assert bool(found.dequantize().isfinite().all())


def test_gptq_refuses_one_scale_per_tensor_and_statistics_that_are_not_finite():
    with pytest.raises(ConfigError, match="one per tensor"):
        gptq(weight(), torch.eye(64), QuantSpec(bits=4, group_size="tensor"))
    with pytest.raises(ConfigError, match="NaN or Inf"):
        gptq(weight(), torch.full((64, 64), float("nan")), QuantSpec(bits=4))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 16, 64])
def test_clipping_never_loses_more_than_rtn(group, symmetric):
    spec, w = QuantSpec(bits=3, group_size=group, symmetric=symmetric), weight()
    gram = gram_of(inputs_of())
    size = spec.group(64)
    blocks = torch.block_diag(*[gram[i : i + size, i : i + size] for i in range(0, 64, size)])
    found = output_error(clipped(w, gram, spec).dequantize() - w, blocks)
    assert found <= output_error(rtn(w, spec).dequantize() - w, blocks) * (1 + 1e-5)


def test_one_huge_row_does_not_decide_how_the_others_are_rounded():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(64, 16, generator=generator)
    huge = torch.cat([x, 1e3 * torch.randn(1, 16, generator=generator)])
    its, plain = Statistics.empty(16), Statistics.empty(16)
    its.add(huge)
    plain.add(x)
    limit = 4 * huge.norm(dim=1).median()
    shortened = huge[-1:] * (limit / huge[-1].norm())
    torch.testing.assert_close(its.gram, plain.gram + shortened.T @ shortened)
    torch.testing.assert_close(its.square_sum, its.gram.diagonal())
    assert torch.equal(its.abs_max, huge.abs().amax(0))  # what int8 activations must hold
    torch.testing.assert_close(plain.gram, x.T @ x)


def test_rows_of_zeros_are_counted_and_change_nothing():
    its = Statistics.empty(4)
    its.add(torch.zeros(3, 4))
    assert its.rows == 3
    assert not its.gram.any()


def test_a_row_whose_norm_overflows_is_not_dropped():
    x = torch.randn(10, 8, generator=torch.Generator().manual_seed(6))
    x[0] = 3e19
    its = Statistics.empty(8)
    its.add(x)
    assert not its.gram.isfinite().all()
    with pytest.raises(ConfigError, match="NaN or Inf"):
        gptq(torch.randn(4, 8), its.gram, QuantSpec(bits=4))
