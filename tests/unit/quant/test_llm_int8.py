"""LLM.int8() and SmoothQuant keep the precision that outlier channels cost plain int8."""

import pytest
import torch

from easyllm.ops.quantized_linear import quantize_rows
from easyllm.quant.llm_int8 import THRESHOLD, quantize_int8
from easyllm.quant.rtn import rtn
from easyllm.quant.spec import QuantSpec

OUTLIERS = (3, 40, 77)


def weight(outputs=72, inputs=96):
    return 0.05 * torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))


def activations(rows=32, inputs=96, size=60.0):
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1))
    x[:, OUTLIERS] *= size
    return x


def by_token(x):
    """Plain int8: a scale for each token."""
    unit = x.abs().amax(1, keepdim=True) / 127
    return (x / unit).round() * unit


def test_outlier_channels_fail_in_plain_int8_and_survive_in_llm_int8_and_smoothquant():
    w, x = weight(), activations(size=120.0)
    small = x.clone()
    small[:, OUTLIERS] = 0

    def lost(found, inputs, weights):
        """The error of rounded inputs, relative to what the ordinary channels contribute."""
        return float((found - inputs @ weights.T).norm() / (small @ w.T).norm())

    stored = quantize_int8(w)
    factors = (x.abs().amax(0) / w.abs().amax(0)).sqrt()  # α = 1/2
    moved = rtn(w * factors, QuantSpec(bits=8)).dequantize()
    assert lost(by_token(x) @ stored.dense().T, x, stored.dense()) > 0.3
    assert lost(stored.linear(x), x, stored.dense()) < 0.02
    assert lost(by_token(x / factors) @ moved.T, x / factors, moved) < 0.1


def test_values_below_the_threshold_are_multiplied_as_int8_and_others_in_full():
    w = weight()
    stored = quantize_int8(w)
    x = activations(size=1.0).clamp(-THRESHOLD + 0.1, THRESHOLD - 0.1)
    exact = quantize_rows(x) @ stored.dense().T
    torch.testing.assert_close(stored.linear(x), exact, rtol=1e-4, atol=1e-4)
    x[5, 7] = 1000.0
    rest = x.clone()
    rest[5, 7] = 0
    expected = quantize_rows(rest) @ stored.dense().T
    expected[5] += 1000.0 * stored.dense()[:, 7]
    torch.testing.assert_close(stored.linear(x), expected, rtol=1e-5, atol=1e-4)
    # a row does not depend on the outliers of others
    assert torch.equal(stored.linear(x)[:5], stored.linear(x[:5]))
    stored.threshold = 0.0
    torch.testing.assert_close(
        stored.linear(x), quantize_rows(x) @ stored.dense().T, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("shape", [(72, 96), (7, 50), (8, 32)])
def test_codes_and_scales_travel_in_the_layout_of_bitsandbytes(shape):
    w = weight(*shape)
    stored = quantize_int8(w)
    tensors = stored.tensors()
    assert tensors["weight"].dtype == torch.int8
    assert tuple(tensors["weight"].shape) == shape
    torch.testing.assert_close(tensors["SCB"], w.abs().amax(1))
    dense = tensors["weight"].float() * tensors["SCB"][:, None] / 127
    torch.testing.assert_close(stored.dense(), dense)
    assert (dense - w).abs().max() <= w.abs().max() / 127 / 2 * 1.001
    ids = torch.tensor([shape[0] - 1, 0])
    assert torch.equal(stored.rows(ids), stored.dense()[ids])


def test_gradients_reach_the_input_through_outliers():
    stored = quantize_int8(weight())
    x = activations().requires_grad_()
    stored.linear(x).sum().backward()
    expected = stored.dense().sum(0).expand_as(x)
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)
