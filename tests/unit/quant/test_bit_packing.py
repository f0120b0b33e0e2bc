"""Codes in 32-bit words, and the layouts of GPTQ, AWQ and compressed-tensors."""

import pytest
import torch

from easyllm.core.errors import CheckpointError
from easyllm.quant.formats import awq, compressed_tensors, gptq
from easyllm.quant.formats.bits import pack_bits, packed_words, unpack_bits
from easyllm.quant.gptq import GPTQOptions
from easyllm.quant.gptq import gptq as quantize_gptq
from easyllm.quant.rtn import rtn
from easyllm.quant.spec import QuantSpec


def by_hand(codes, bits):
    """Returns the words of one row of codes, as whole numbers."""
    total = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    words = [(total >> (32 * i)) & 0xFFFFFFFF for i in range(packed_words(len(codes), bits))]
    return [word - (1 << 32) if word >> 31 else word for word in words]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 7, 10, 11, 21, 22, 32, 33, 64, 96, 100])
def test_codes_follow_each_other_from_the_lowest_bit(bits, count):
    codes = torch.randint(0, 1 << bits, (3, count), generator=torch.Generator().manual_seed(count))
    words = pack_bits(codes, bits)
    assert words.dtype == torch.int32
    assert words.tolist() == [by_hand(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack_bits(words, bits, count).long(), codes)
    along = pack_bits(codes.T, bits, dim=0)
    assert torch.equal(along, words.T)
    assert torch.equal(unpack_bits(along, bits, count, dim=0).long(), codes.T)


def weight(outputs=64, inputs=96):
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_files_hold_exactly_the_weight(bits, group, symmetric):
    spec = QuantSpec(bits=bits, group_size=group, symmetric=symmetric)
    assert gptq.unsupported_reason(spec, 64, 96) is None
    made = rtn(weight(), spec)
    tensors, config = gptq.to_tensors(made), gptq.to_config(spec, act_order=False)
    groups = 1 if group is None else 3
    assert {name: list(t.shape) for name, t in tensors.items()} == {
        "qweight": [96 * bits // 32, 64],
        "qzeros": [groups, 64 * bits // 32],
        "scales": [groups, 64],
        "g_idx": [96],
    }
    again = gptq.from_tensors(tensors, (64, 96), config)
    assert torch.equal(again.dequantize(), made.dequantize())
    assert again.spec == spec


def test_gptq_files_hold_the_order_of_activations():
    x = torch.randn(200, 96, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, 96)
    spec = QuantSpec(bits=4, group_size=32)
    made = quantize_gptq(weight(), x.T @ x, spec, GPTQOptions(static_groups=False))
    tensors = gptq.to_tensors(made)
    assert tensors["g_idx"].bincount().tolist() == [32, 32, 32]
    assert tensors["g_idx"].tolist() != sorted(tensors["g_idx"].tolist())
    again = gptq.from_tensors(tensors, (64, 96), gptq.to_config(spec, act_order=True))
    assert torch.equal(again.dequantize(), made.dequantize())


def test_gptq_files_of_the_older_format_store_zero_points_less_one():
    made = rtn(weight(), QuantSpec(bits=4, group_size=32))
    zeros = unpack_bits(gptq.to_tensors(made)["qzeros"], 4, 64)
    assert zeros.unique().tolist() == [7]


def test_awq_files_hold_exactly_the_weight_in_their_order():
    spec = QuantSpec(bits=4, group_size=32, symmetric=False)
    made = rtn(weight(), spec)
    tensors = awq.to_tensors(made)
    assert list(tensors["qweight"].shape) == [96, 8]
    word = int(tensors["qweight"][5, 1]) & 0xFFFFFFFF
    nibbles = [(word >> (4 * i)) & 15 for i in range(8)]
    assert nibbles == [int(made.codes[8 + n, 5]) for n in (0, 2, 4, 6, 1, 3, 5, 7)]
    again = awq.from_tensors(tensors, (64, 96), awq.to_config(spec))
    assert torch.equal(again.dequantize(), made.dequantize())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 32, "tensor"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_compressed_tensors_files_hold_exactly_the_weight(bits, group, symmetric, dtype):
    spec = QuantSpec(bits=bits, group_size=group, symmetric=symmetric, scale_dtype=dtype)
    made = rtn(weight(), spec)
    tensors = compressed_tensors.to_tensors(made)
    config = compressed_tensors.to_config({"a": spec}, ignore=["lm_head"])
    again = compressed_tensors.from_tensors(tensors, (64, 96), config)
    assert torch.equal(again.dequantize(), made.dequantize())


def test_compressed_tensors_files_of_8_bit_weights_and_activations():
    spec = QuantSpec(bits=8, activations=True)
    made = rtn(weight(), spec)
    tensors = compressed_tensors.to_tensors(made)
    assert tensors["weight"].dtype == torch.int8
    config = compressed_tensors.to_config({"a": spec}, ignore=[])
    assert config["format"] == "int-quantized"
    again = compressed_tensors.from_tensors(tensors, (64, 96), config)
    assert torch.equal(again.dequantize(), made.dequantize())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"qweight": torch.zeros(11, 64, dtype=torch.int32)}, r"qweight has shape \[11, 64\]"),
        ({"scales": torch.zeros(2, 64)}, r"scales has shape \[2, 64\], expected \[3, 64\]"),
        ({"qweight": torch.zeros(12, 64)}, "qweight has dtype torch.float32, expected torch.int32"),
        ({"g_idx": torch.full((96,), 3, dtype=torch.int32)}, r"g_idx names groups outside 0 .. 2"),
        ({"g_idx": torch.full((96,), -1, dtype=torch.int32)}, r"g_idx names groups outside"),
    ],
)
def test_gptq_tensors_that_contradict_the_configuration_are_named(change, words):
    spec = QuantSpec(bits=4, group_size=32)
    tensors = gptq.to_tensors(rtn(weight(), spec)) | change
    with pytest.raises(CheckpointError, match=words):
        gptq.from_tensors(tensors, (64, 96), gptq.to_config(spec, act_order=False))
