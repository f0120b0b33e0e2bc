"""NF4, FP4 and int8 folders in the layout of bitsandbytes: saved, loaded, refused if damaged."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from easyllm.core.errors import CheckpointError
from easyllm.engine import LLM, SamplingParams
from easyllm.models import load_model, save_model
from easyllm.quant import quantize_weights
from tiny_models import build_tiny

IDS = torch.arange(5, 45)
SCHEMES = ("nf4", "nf4-single", "fp4", "fp4-single", "llm.int8")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "q"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_saved_model_is_the_same_after_loading(scheme, folder, tmp_path, tiny_tokenizer):
    model = quantize_weights(build_tiny(vocab_size=tiny_tokenizer.vocab_size), scheme)
    save_model(model, folder, tokenizer=tiny_tokenizer)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitsandbytes"
    assert config["load_in_8bit"] == (scheme == "llm.int8")
    again = load_model(folder)
    assert again.packed_formats() == {scheme}
    assert torch.equal(again.logits(IDS), model.logits(IDS))
    save_model(again, tmp_path / "r", tokenizer=tiny_tokenizer)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "qr"]
    assert files[0] == files[1]
    (found,) = LLM(folder).generate([[5, 6, 7]], SamplingParams(max_tokens=3))
    assert found.token_ids


def change(folder, edit):
    """Applies a function to the tensors of a folder."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


ADDED = ("SCB", "weight_format")
NAME = "model.layers.0.self_attn.q_proj.weight"
DAMAGE = {
    "a missing map": (lambda t: t.pop(f"{NAME}.quant_map"), "missing: .*quant_map"),
    "a short code tensor": (
        lambda t: t.update({NAME: t[NAME][:-1].clone()}),
        r"weight has shape \[1023, 1\], expected \[1024, 1\]",
    ),
    "another map": (
        lambda t: t.update({f"{NAME}.quant_map": t[f"{NAME}.quant_map"] * 2}),
        "has other values than those of nf4",
    ),
    "another dtype": (
        lambda t: t.update({f"{NAME}.nested_absmax": t[f"{NAME}.nested_absmax"].int()}),
        "weight.nested_absmax has dtype torch.int32, expected torch.float32",
    ),
    "no JSON": (
        lambda t: t.update(
            {
                f"{NAME}.quant_state.bitsandbytes__nf4": torch.zeros(5, dtype=torch.uint8),
            }
        ),
        "cannot be read as nf4",
    ),
    "NaN scales": (
        lambda t: t.update(
            {f"{NAME}.nested_absmax": torch.full_like(t[f"{NAME}.nested_absmax"], torch.nan)}
        ),
        "NaN or infinite",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_by_name(damage, folder):
    save_model(quantize_weights(build_tiny(), "nf4"), folder)
    edit, words = DAMAGE[damage]
    change(folder, edit)
    with pytest.raises(CheckpointError, match=words):
        load_model(folder)


def test_int8_codes_without_their_scales_are_refused(folder):
    save_model(quantize_weights(build_tiny(), "llm.int8"), folder)
    change(folder, lambda tensors: [tensors.pop(n) for n in list(tensors) if n.endswith(ADDED)])
    with pytest.raises(CheckpointError, match=r"dtype torch.int8, but no scales"):
        load_model(folder)


@pytest.mark.parametrize("order", [None, 0, 1])
def test_int8_codes_are_read_by_row_only(order, folder):
    model = quantize_weights(build_tiny(), "llm.int8")
    save_model(model, folder)

    def edit(tensors):
        for name in [name for name in tensors if name.endswith("weight_format")]:
            del tensors[name]
            if order is not None:
                tensors[name] = torch.tensor(order, dtype=torch.uint8)

    change(folder, edit)
    if order:
        with pytest.raises(CheckpointError, match="weight_format is 1, expected 0"):
            load_model(folder)
    else:
        assert torch.equal(load_model(folder).logits(IDS), model.logits(IDS))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"load_in_8bit": True}, "expected one of them"),
        ({"bnb_4bit_quant_type": "nf5"}, "expected nf4 or fp4"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "expected nf4 or fp4 in uint8"),
        (
            {"llm_int8_threshold": "big", "load_in_4bit": False, "load_in_8bit": True},
            "cannot be read",
        ),
        ({"rotate": True}, "is not known and may change the result"),
    ],
)
def test_a_configuration_that_is_not_supported_is_named(values, words, folder):
    save_model(quantize_weights(build_tiny(), "nf4"), folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= values
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        load_model(folder)
