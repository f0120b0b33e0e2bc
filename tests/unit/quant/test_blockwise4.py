"""NF4 and FP4: the bits of bitsandbytes, sizes, loading and what is refused.

The expected numbers are those of bitsandbytes 0.50.2 on a CPU; `tests/interop/bnb` makes
the comparison with the library itself.
"""

import hashlib

import pytest
import torch

from easyllm.core.errors import ConfigError
from easyllm.models import load_model
from easyllm.nn.linear import Linear
from easyllm.quant import blockwise4, find_scheme, quantize_blockwise4, quantize_weights
from tiny_models import build_tiny

SCHEMES = ("nf4", "nf4-single", "fp4", "fp4-single")


def weight(outputs, inputs):
    """Returns integers in every size, times a power of two: sums and means are exact."""
    i = torch.arange(outputs * inputs)
    numbers = ((i * 7919 + i * i) % 1009 - 504) * (1 + i // 64 % 7)
    numbers[64:128] = 0
    return (numbers.float() / 8192).view(outputs, inputs)


def digest(tensor):
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("codebook", "codes", "start"),
    [
        ("nf4", "1cb3809a0af2c1b1", [14, 200, 82, 31, 236, 150]),
        ("fp4", "b47b12382590c3d4", [178, 70, 237, 163, 37, 110]),
    ],
)
def test_codes_and_scales_are_those_of_bitsandbytes(codebook, codes, start):
    single = quantize_blockwise4(weight(130, 150), codebook, nested=False)
    assert single.codes[:6].tolist() == start
    assert digest(single.codes) == codes
    assert single.absmax[:4].tolist() == [0.0615234375, 0.0, 0.1845703125, 0.2431640625]
    assert digest(single.absmax) == "721826b7f27fd40d"

    double = quantize_blockwise4(weight(130, 150), codebook, nested=True)
    assert torch.equal(double.codes, single.codes)
    assert double.nested_offset.item() == 0.24104323983192444
    assert double.nested_absmax.tolist() == [0.24104323983192444, 0.18962082266807556]
    assert double.absmax[:6].tolist() == [18, 0, 54, 156, 203, 220]
    assert digest(double.absmax) == "f6c8a216d132eefe"


def test_a_short_last_block_of_an_odd_number_of_weights_is_that_of_bitsandbytes():
    found = quantize_blockwise4(weight(13, 5), "nf4", nested=True)
    assert found.codes.tolist() == [
        *(14, 200, 82, 31, 236, 150, 50, 15, 236, 150, 66, 16, 254, 202, 134, 66, 16),
        *(254, 236, 185, 134, 67, 33, 16, 15, 238, 220, 203, 169, 135, 102, 84, 119),
    ]
    assert found.absmax.tolist() == [255, 0]
    assert quantize_blockwise4(weight(13, 5), "nf4", nested=False).absmax.tolist() == [
        *(0.0615234375, 9.999999350456404e-39)  # a zero weight in a block of its own
    ]


@pytest.mark.parametrize(("codebook", "byte"), [("nf4", 0x77), ("fp4", 0)])
def test_zeros_have_the_code_of_zero_and_no_scale(codebook, byte):
    found = quantize_blockwise4(torch.zeros(2, 64), codebook, nested=False)
    assert found.codes.unique().tolist() == [byte]
    assert found.absmax.tolist() == [0, 0]


def test_ties_go_to_the_smaller_value():
    values, _ = blockwise4.rounding("nf4", torch.device("cpu"))
    row = torch.cat([values, torch.ones(49)])[None]
    found = quantize_blockwise4(row, "nf4", nested=False)
    codes = torch.stack([found.codes >> 4, found.codes & 15], dim=1).view(-1)
    assert codes[:15].tolist() == list(range(15))


@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_quantizing_in_pieces_changes_nothing(monkeypatch, codebook):
    whole = quantize_blockwise4(weight(130, 151), codebook, nested=True)
    monkeypatch.setattr(blockwise4, "PIECE", 640)
    again = quantize_blockwise4(weight(130, 151), codebook, nested=True)
    assert torch.equal(whole.codes, again.codes)
    assert torch.equal(whole.absmax, again.absmax)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_per_weight_are_those_of_the_paper(scheme):
    """4.5 bits, and 4.127 with double quantization (arXiv 2305.14314, section 3)."""
    bits = find_scheme(scheme).num_bytes((4096, 4096)) * 8 / 4096**2
    assert bits == pytest.approx(4.5 if scheme.endswith("single") else 4.127, abs=5e-4)


def test_embedding_and_head_stay_in_full_precision():
    model = quantize_weights(build_tiny(tie_word_embeddings=False), "nf4")
    assert model.embed_tokens.storage.format == model.lm_head.storage.format == "dense"
    linears = [m for m in model.layers.modules() if isinstance(m, Linear)]
    assert {linear.storage.format for linear in linears} == {"nf4"}


@pytest.mark.slow
def test_the_linears_of_smollm2_take_less_than_0_6_bytes_per_weight():
    model = load_model("smollm2", quantize="nf4")
    packed = [h.storage for _, h in model.weight_modules() if h.storage.format == "nf4"]
    weights = sum(storage.shape[0] * storage.shape[1] for storage in packed)
    assert len(packed) == 210
    assert sum(storage.num_bytes for storage in packed) < 0.52 * weights


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantizing_during_loading_equals_quantizing_afterwards(tiny_folder, scheme):
    read = load_model(tiny_folder, dtype="float32", quantize=scheme).state_dict()
    after = quantize_weights(load_model(tiny_folder, dtype="float32"), scheme).state_dict()
    assert read.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in read.items())


def test_an_unknown_name_is_answered_with_a_near_one():
    with pytest.raises(ConfigError, match="did you mean 'nf4'"):
        find_scheme("nf-4")


def test_the_constants_take_the_published_memory():
    """Dettmers et al. 2023 (arXiv 2305.14314), section 3: 0.127 bits, 3 GB less for 65B."""
    shape = (8192, 8192)
    weights = shape[0] * shape[1]
    bits = {
        name: 8 * find_scheme(name).num_bytes(shape) / weights - 4 for name in ("nf4", "nf4-single")
    }
    # nested, the mean of the scales is one more number
    assert bits["nf4-single"] == 0.5
    assert bits["nf4"] == pytest.approx(0.126953125, abs=1e-5)
    assert (bits["nf4-single"] - bits["nf4"]) / 8 * 65 == pytest.approx(3.03, abs=0.005)
