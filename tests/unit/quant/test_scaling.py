"""Factors between modules: the function stays as it is; what AWQ and SmoothQuant choose."""

import pytest
import torch

from easyllm.quant.awq import find_factors
from easyllm.quant.calibrate import LayerWalk
from easyllm.quant.rtn import rtn
from easyllm.quant.scaling import scale_groups
from easyllm.quant.smoothquant import smoothing_factors
from easyllm.quant.spec import QuantSpec
from easyllm.quant.statistics import output_error
from tiny_models import build_tiny

IDS = torch.arange(5, 45)
KINDS = {
    "llama": {},
    "llama, as many value heads": {"num_key_value_heads": 4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "glm4": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 64},
}


def sequences(count=6, length=24):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 250, (length,), generator=generator) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_folding_factors_leaves_the_function_as_it_is(kind):
    model = build_tiny(model_type=kind.partition(",")[0], **KINDS[kind])
    before = model.logits(IDS)
    generator = torch.Generator().manual_seed(0)
    groups = [group for layer in model.layers for group in scale_groups(layer)]
    assert len(groups) >= 4
    with torch.no_grad():
        for group in groups:
            channels = group.gather(torch.ones(next(iter(group.linears.values())).in_features))
            group.fold(torch.rand(len(channels), generator=generator) * 3 + 0.3)
    torch.testing.assert_close(model.logits(IDS), before, atol=2e-4, rtol=1e-3)


def observed(model, number=0):
    layer = model.layers[number]
    walk = LayerWalk(model, sequences())
    groups = list(scale_groups(layer))
    names = [name for group in groups for name in group.linears]
    return layer, groups, walk.statistics(layer, names, gram=True)


def test_linears_with_the_same_input_share_their_statistics():
    _, _, found = observed(build_tiny())
    assert found["mixer.q_proj"] is found["mixer.k_proj"] is found["mixer.v_proj"]
    assert found["mixer.o_proj"] is not found["mixer.q_proj"]
    its = found["mixer.q_proj"]
    assert its.rows == 6 * 24
    assert torch.equal(its.gram.diagonal(), its.square_sum) or torch.allclose(
        its.gram.diagonal(), its.square_sum, rtol=1e-4
    )


def test_statistics_are_those_of_the_inputs_in_the_whole_model():
    model = build_tiny()
    seen = []
    handle = model.layers[1].feed_forward.down_proj.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    for sequence in sequences():
        model.logits(sequence)
    handle.remove()
    rows = torch.cat(seen)
    walk = LayerWalk(model, sequences())
    walk.advance(model.layers[0])
    found = walk.statistics(model.layers[1], ["feed_forward.down_proj"], gram=True)
    its = found["feed_forward.down_proj"]
    torch.testing.assert_close(its.gram, rows.T @ rows, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(its.abs_max, rows.abs().amax(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(its.mean_abs, rows.abs().mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bits", [3, 4])
def test_the_factors_of_awq_never_lose_more_than_rtn(bits):
    spec = QuantSpec(bits=bits, group_size=16, symmetric=False)
    model = build_tiny()
    _, groups, statistics = observed(model)
    smaller = 0
    for group in groups:
        its = [statistics[name] for name in group.linears]
        found = find_factors(group, its, spec)
        assert found.error <= found.rtn_error
        smaller += found.error < found.rtn_error
        rtn_error = sum(
            float(output_error(rtn(linear.weight, spec).dequantize() - linear.weight, s.gram))
            for linear, s in zip(group.linears.values(), its, strict=True)
        )
        assert found.rtn_error == pytest.approx(rtn_error, rel=1e-4)
        # the error that is reported is that of the folded weights with the divided inputs
        group.fold(found.factors)
        columns = group.spread(found.factors)
        after = sum(
            float(
                output_error(
                    rtn(linear.weight, spec).dequantize() - linear.weight, s.divided(columns).gram
                )
            )
            for linear, s in zip(group.linears.values(), its, strict=True)
        )
        assert after == pytest.approx(found.error, rel=1e-3)
    assert smaller >= 2


def test_smoothing_balances_inputs_and_weights():
    model = build_tiny()
    _, groups, statistics = observed(model)
    group = groups[0]
    its = [statistics[name] for name in group.linears]
    factors = smoothing_factors(group, its, alpha=0.5)
    group.fold(factors)
    inputs = its[0].divided(factors).abs_max
    weights = torch.stack([m.weight.abs().amax(0) for m in group.linears.values()]).amax(0)
    torch.testing.assert_close(inputs, weights, rtol=1e-3, atol=1e-5)
