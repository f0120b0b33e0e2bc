"""GGUF blocks: read by the gguf package, with smaller errors than plain rounding."""

import gguf
import numpy as np
import pytest
import torch

from easyllm.quant.gguf_blocks import TYPES, quantize_blocks
from easyllm.quant.gguf_weight import GGUFWeight

ROUNDED_BY_GGUF = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
# root-mean-square error of N(0, 1) weights
BOUNDS = {
    "q8_0": 0.008,
    "q6_k": 0.023,
    "q5_0": 0.052,
    "q5_1": 0.040,
    "q5_k": 0.042,
    "q4_0": 0.095,
    "q4_1": 0.080,
    "q4_k": 0.085,
}


def weight(outputs=64, inputs=512, seed=0):
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def read(data, name, shape=(64, 512)):
    type = getattr(gguf.GGMLQuantizationType, name.upper())
    return torch.from_numpy(gguf.quants.dequantize(data.numpy(), type).reshape(shape).copy())


def error(data, name, w, u=1.0):
    return float((u * (read(data, name, tuple(w.shape)) - w).square()).mean().sqrt())


@pytest.mark.parametrize("name", TYPES)
def test_the_gguf_package_reads_every_type(name):
    w, type = weight(), TYPES[name]
    data = quantize_blocks(w, type)
    assert data.dtype == torch.uint8
    assert data.shape == (64, 512 // type.block * type.num_bytes)
    sizes = gguf.GGML_QUANT_SIZES[getattr(gguf.GGMLQuantizationType, name.upper())]
    assert sizes == (type.block, type.num_bytes)
    assert 0.2 * BOUNDS[name] < error(data, name, w) < BOUNDS[name]


@pytest.mark.parametrize("name", ROUNDED_BY_GGUF)
def test_errors_are_at_most_those_of_the_gguf_package(name):
    w = weight()
    type = getattr(gguf.GGMLQuantizationType, name.upper())
    theirs = torch.from_numpy(np.ascontiguousarray(gguf.quants.quantize(w.numpy(), type)))
    ours = error(quantize_blocks(w, TYPES[name]), name, w)
    # with no importance, large weights count more, so plain errors may be a little larger
    assert ours <= error(theirs, name, w) * 1.02


@pytest.mark.parametrize("name", [n for n in TYPES if n != "q8_0"])
def test_an_importance_matrix_lowers_the_error_it_weighs(name):
    w = weight()
    importance = torch.logspace(-2, 2, 512)[
        torch.randperm(512, generator=torch.Generator().manual_seed(1))
    ]
    with_it = error(quantize_blocks(w, TYPES[name], importance), name, w, importance)
    without = error(quantize_blocks(w, TYPES[name]), name, w, importance)
    assert with_it < 0.97 * without


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(
    "w",
    [
        torch.zeros(2, 256),
        torch.full((2, 256), 0.37),
        torch.full((2, 256), -2.5),
        torch.cat([torch.zeros(2, 255), torch.full((2, 1), 9.0)], 1),
        1e-8 * torch.ones(2, 256),
        torch.arange(512).view(2, 256) / 512,
    ],
    ids=["zeros", "constant", "negative", "one value", "tiny", "ramp"],
)
def test_special_blocks(name, w):
    found = read(quantize_blocks(w, TYPES[name]), name, (2, 256))
    assert bool(found.isfinite().all())
    assert (found - w).abs().max() <= 0.07 * w.abs().max() + 1e-6


@pytest.mark.parametrize("name", TYPES)
def test_an_input_that_never_occurs_does_not_spoil_the_others(name):
    w, importance = weight(), torch.ones(512)
    importance[::3] = 0
    found = read(quantize_blocks(w, TYPES[name], importance), name)
    assert bool(found.isfinite().all())
    assert (found - w).square().mean().sqrt() < 3 * BOUNDS[name]


@pytest.mark.parametrize("name", TYPES)
def test_a_stored_weight_has_the_values_that_the_gguf_package_reads(name):
    w = weight()
    raw = quantize_blocks(w, TYPES[name])
    stored = GGUFWeight(raw, name, (64, 512), torch.float32)
    assert torch.equal(stored.dense(), read(raw, name))
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(2))
    expected = x @ stored.dense().T
    assert (stored.linear(x) - expected).norm() < 0.02 * expected.norm()
    assert stored.num_bytes <= raw.numel() * 1.03
