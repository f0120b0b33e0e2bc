"""Products with K-quants, whose scales are quantized themselves: layout, C kernel, row look-ups."""

import pytest
import torch

from easyllm.ops.kernels import kernels_for
from easyllm.ops.packed_linear import packed_linear, reference_packed_linear
from easyllm.ops.quantized_linear import quantize_rows
from easyllm.quant.gguf_blocks import TYPES, quantize_blocks
from easyllm.quant.gguf_weight import BITS, SUPER_BITS, GGUFWeight

SHAPES = [(8, 256), (24, 512), (20, 768), (7, 256)]


def stored(name, outputs, inputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator) * 0.1
    raw = quantize_blocks(weight, TYPES[name])
    return GGUFWeight(raw, name, (outputs, inputs), torch.float32)


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 33])
@pytest.mark.parametrize("name", SUPER_BITS)
def test_the_kernel_is_exact_for_quantized_rows(name, rows):
    for outputs, inputs in SHAPES:
        x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows))
        if kernels_for(x) is None:
            pytest.skip("no kernels")
        weight = stored(name, outputs, inputs)
        bias = torch.randn(outputs, generator=torch.Generator().manual_seed(1))
        found = packed_linear(x, weight.matrix, bias).double()
        expected = quantize_rows(x).double() @ weight.dense().double().T + bias.double()
        assert (found - expected).abs().max() < 5e-6 * expected.abs().max()
        reference = reference_packed_linear(x, weight.matrix, bias)
        assert (found - reference).norm() < 0.01 * reference.norm()


@pytest.mark.parametrize("name", SUPER_BITS)
def test_rows_do_not_depend_on_each_other(name):
    weight = stored(name, 24, 512)
    x = torch.randn(9, 512, generator=torch.Generator().manual_seed(0))
    whole = weight.linear(x)
    for i in range(9):
        assert torch.equal(weight.linear(x[i : i + 1]), whole[i : i + 1])


@pytest.mark.parametrize("name", [*BITS, *SUPER_BITS])
def test_looked_up_rows_are_those_of_the_weight(name):
    weight = stored(name, 20, 512)
    ids = torch.tensor([19, 0, 7, 8, 7])
    assert torch.equal(weight.rows(ids), weight.dense()[ids])
    assert weight.rows(ids[:0]).shape == (0, 512)
