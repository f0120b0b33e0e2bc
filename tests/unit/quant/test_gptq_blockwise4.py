"""GPTQ on the values of NF4 and FP4: smaller errors, special cases, what a file holds."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from easyllm.core.errors import ConfigError
from easyllm.ops.blockwise4 import codebook, dequantize
from easyllm.quant import quantize_blockwise4
from easyllm.quant.gptq_blockwise4 import gptq_blockwise4, quantize_layers
from easyllm.quant.layer_files import LayerFiles
from easyllm.quant.statistics import Statistics, output_error
from tiny_models import build_tiny


def weight(outputs=40, inputs=128):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(outputs, inputs, generator=generator) * 0.3


def gram(width=128, rows=600):
    """Returns Σ x xᵀ of correlated inputs whose channels differ in size."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    sizes = torch.logspace(-1, 1, width)[torch.randperm(width, generator=generator)]
    its = Statistics.empty(width)
    its.add(torch.randn(rows, width, generator=generator) @ (torch.eye(width) + mixing) * sizes)
    return its.gram


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_outputs_change_far_less_than_by_rounding_to_nearest(name, nested):
    w, h = weight(), gram()
    nearest = dequantize(quantize_blockwise4(w, name, nested=nested)) - w
    found = gptq_blockwise4(w, h, name, nested=nested)
    assert output_error(dequantize(found) - w, h) < 0.5 * output_error(nearest, h)
    assert found.codes.shape == (40 * 128 // 2,)
    assert found.absmax.shape == (40 * 2,)
    assert (found.nested_offset is not None) == nested


def test_with_a_diagonal_gram_each_weight_is_the_nearest_value_of_its_block():
    w = weight()
    found = gptq_blockwise4(w, torch.diag(torch.rand(128) + 0.1), "nf4", nested=False)
    values = codebook("nf4", torch.device("cpu"))
    grid = found.scales().view(40, 2, 1, 1) * values
    distance = (w.view(40, 2, 64, 1) - grid).abs()
    rounded = dequantize(found).view(40, 2, 64)
    torch.testing.assert_close((w.view(40, 2, 64) - rounded).abs(), distance.amin(-1))


def test_a_scale_is_never_worse_for_its_block_than_the_absmax():
    w, h = weight(), torch.diag(torch.logspace(-2, 2, 128))
    found = dequantize(gptq_blockwise4(w, h, "nf4", nested=False)) - w
    nearest = dequantize(quantize_blockwise4(w, "nf4", nested=False)) - w
    block_error = [((d.view(40, 2, 64) ** 2) * h.diagonal().view(2, 64)) for d in (found, nearest)]
    assert bool((block_error[0].sum(-1) <= block_error[1].sum(-1) * (1 + 1e-5)).all())


@pytest.mark.parametrize("nested", [True, False])
def test_blocks_of_zeros_and_unused_inputs_stay_finite(nested):
    w, h = weight(), gram()
    w[3] = 0
    w[:, 64:] = 0
    h[5] = h[:, 5] = 0
    found = dequantize(gptq_blockwise4(w, h, "nf4", nested=nested))
    assert bool(found.isfinite().all())
    assert found[3].abs().max() < 1e-6 or nested  # double quantization has no exact zero scale


def test_refusals_say_what_would_do():
    with pytest.raises(
        ConfigError, match=r"has 96 inputs.* needs a multiple of 64; use method nf4"
    ):
        gptq_blockwise4(weight(8, 96), torch.eye(96), "nf4", nested=True)
    with pytest.raises(ConfigError, match="NaN or Inf"):
        gptq_blockwise4(weight(), torch.full((128, 128), torch.nan), "nf4", nested=True)


@pytest.mark.parametrize("scheme", ["nf4", "nf4-single"])
def test_a_damaged_layer_is_quantized_again(tmp_path, scheme):
    def quantized():
        model = build_tiny(hidden_size=64, intermediate_size=64)
        chosen = {n: m for n, m in model.named_modules() if n.endswith("_proj")}
        files = LayerFiles(tmp_path / "layers", "key")
        quantize_layers(model, [torch.arange(20)], chosen=chosen, scheme=scheme, files=files)
        return {n: m.storage.dense() for n, m in chosen.items()}

    first = quantized()
    path = next((tmp_path / "layers").glob("layer-0000*"))
    whole = path.read_bytes()
    for part in ("absmax",) if scheme == "nf4-single" else ("nested_absmax", "nested_offset"):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            reports = file.metadata()
        damaged = next(t for name, t in tensors.items() if name.endswith(f".{part}"))
        damaged.view(-1)[0] = float("nan")
        save_file(tensors, path, metadata=reports)
        again = quantized()
        assert all(torch.equal(again[name], first[name]) for name in first)
        assert path.read_bytes() == whole
