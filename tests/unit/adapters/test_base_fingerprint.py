"""An adapter on another base than it was trained on: refused by shape, else warned about."""

import logging

import pytest
import torch

from adapter_kinds import BIASES, SETTINGS, config_of, model_with
from easyllm.adapters import attach, save_adapter
from easyllm.adapters.base_fingerprint import FINGERPRINT_FILE, differing, fingerprint
from easyllm.models import add_adapter, hf_module_name, load_model, save_model, to_classifier
from easyllm.quant import quantize_weights
from tiny_models import build_tiny


def saved(tmp_path, kind="lora"):
    model, _ = model_with(kind)
    return save_adapter(
        model, tmp_path / "a", module_name=hf_module_name(model), base="org/the-base"
    )


def base(seed=0, **changes):
    return build_tiny(seed, **{**BIASES, **changes})


def warnings_of(caplog, model, folder, **options):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="easyllm.adapters"):
        add_adapter(model, folder, **options)
    return caplog.text


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_base_it_was_trained_on_is_not_warned_about(kind, tmp_path, caplog):
    folder = saved(tmp_path, kind)
    assert warnings_of(caplog, base(), folder) == ""


def test_another_base_of_the_same_shape_is_warned_about_with_both_names(tmp_path, caplog):
    text = warnings_of(caplog, base(seed=1), saved(tmp_path))
    assert "was trained on 'org/the-base', whose embed_tokens.weight" in text
    assert "this llama model" in text
    save_model(base(seed=1), tmp_path / "other")
    with caplog.at_level(logging.WARNING, logger="easyllm.adapters"):
        load_model(tmp_path / "other", adapter=tmp_path / "a")
    assert f"that of '{tmp_path / 'other'}'" in caplog.text


def test_a_single_other_layer_is_noticed():
    one, other = base(), base()
    with torch.no_grad():
        other.layers[1].feed_forward.down_proj.weight.mul_(1.01)
    assert differing(one, fingerprint(one)) is None
    assert differing(other, fingerprint(one)) == "layers.1.feed_forward.down_proj.weight"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_makes_no_difference(dtype):
    """The values of a bf16 file are the same in every wider dtype."""
    narrow = base().to(torch.bfloat16)
    recorded = fingerprint(narrow)
    assert differing(narrow.to(dtype), recorded) is None


def test_a_quantized_base_is_compared_by_what_it_has_in_full(tmp_path, caplog):
    folder = saved(tmp_path)
    assert warnings_of(caplog, quantize_weights(base(), "int8"), folder) == ""
    text = warnings_of(caplog, quantize_weights(base(seed=1), "int8"), folder)
    assert "norm.weight has other values" in text


@pytest.mark.parametrize("text", [None, "not json", "[1]", '{"no.such.parameter": "1"}'])
def test_a_file_without_a_fingerprint_is_loaded_without_a_warning(text, tmp_path, caplog):
    """peft writes none."""
    folder = saved(tmp_path)
    (folder / FINGERPRINT_FILE).unlink()
    if text is not None:
        (folder / FINGERPRINT_FILE).write_text(text)
    assert warnings_of(caplog, base(seed=1), folder) == ""


def test_trained_parameters_of_the_base_have_no_part_in_it(tmp_path):
    model, adapters = model_with("bitfit")
    found = fingerprint(model, without=adapters.base_parameters)
    assert found
    assert not set(found) & set(adapters.base_parameters)
    assert differing(base(), found) is None


def test_a_classification_head_belongs_to_the_adapter(tmp_path, caplog):
    model = to_classifier(base(), 3, seed=5)
    attach(model, config_of("lora"))
    folder = save_adapter(
        model, tmp_path / "a", module_name=hf_module_name(model), base="org/the-base"
    )
    assert warnings_of(caplog, base(), folder) == ""
