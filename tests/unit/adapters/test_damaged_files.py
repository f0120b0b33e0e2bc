"""Files of every method: a lost tensor and a value of another type are refused, by name."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_kinds import BIASES, SETTINGS, model_with
from easyllm.adapters import ADAPTERS, detach, load_adapter, save_adapter
from easyllm.core.errors import CheckpointError
from easyllm.models import hf_module_name
from tiny_models import build_tiny

IDS = torch.arange(5, 45)
VIRTUAL = {
    "prompt": {"kind": "prompt", "num_virtual_tokens": 3},
    "ptuning": {"kind": "ptuning", "num_virtual_tokens": 3, "encoder_hidden_size": 16},
    "prefix": {"kind": "prefix", "num_virtual_tokens": 3},
}
LEAF = re.compile(r"\.(lora|vera|oft|miss|lokr|ia3|token|trainable|base_layer|weight|bias)")
"""The beginning of a parameter's name, after that of its module."""
KINDS = [*SETTINGS, *VIRTUAL]


def saved(kind, folder):
    """Returns a trained model whose adapter is saved in a folder."""
    config = ADAPTERS.validate(VIRTUAL[kind]) if kind in VIRTUAL else kind
    model, _ = model_with(config)
    save_adapter(model, folder, module_name=hf_module_name(model), base="tiny")
    return model


def load(folder):
    model = build_tiny(**BIASES)
    load_adapter(model, folder, module_name=hf_module_name(model))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_without_one_of_its_tensors_is_refused(kind, tmp_path):
    saved(kind, tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    whole = load_file(path)
    for name in whole:
        save_file({n: t for n, t in whole.items() if n != name}, path, {"format": "pt"})
        module = LEAF.split(name.removeprefix("base_model.").removeprefix("model."))[0]
        with pytest.raises(CheckpointError) as error:
            load(tmp_path / "a")
        said = str(error.value)
        assert module in said or "token rows" in said, (name, said)


WRONG = ["abc", "", 7, 0.5, 1e400, True, [], ["abc"], {}, {"q_proj": "abc"}]


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_of_another_type_is_refused_or_changes_nothing(kind, tmp_path):
    expected = saved(kind, tmp_path / "a").logits(IDS)
    path = tmp_path / "a" / "adapter_config.json"
    description, model = json.loads(path.read_text()), build_tiny(**BIASES)
    names = hf_module_name(model)
    for key, value in description.items():
        for wrong in WRONG:
            if type(wrong) is type(value) or {type(wrong), type(value)} == {int, float}:
                continue  # may be a valid value of the key
            path.write_text(json.dumps(description | {key: wrong}))
            refused = refusal(model, tmp_path / "a", names)
            if refused is not None:
                named = key in refused or "peft_type" in refused or "such as" in refused
                assert named, (key, wrong, refused)
                continue
            assert torch.equal(model.logits(IDS), expected), (key, wrong)
            detach(model)


def refusal(model, folder, names):
    """Returns the error of loading an adapter; None if it was loaded."""
    try:
        load_adapter(model, folder, module_name=names)
    except CheckpointError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("kind", "key", "value", "words"),
    [
        ("lora", "use_rslora", "false", "expected true or false"),
        ("lora", "lora_alpha", "16", "expected a finite number"),
        ("lora", "r", 2.0, "expected a whole number"),
        ("lora", "modules_to_save", "norm", "expected a list of names"),
        ("lora", "alpha_pattern", {"q_proj": "9"}, "expected an object of numbers"),
        ("oft", "use_cayley_neumann", "no", "expected true or false"),
        ("vera", "projection_prng_key", "0", "expected a whole number"),
        ("prefix", "prefix_projection", "no", "expected true or false"),
        ("bitfit", "parameters", {"norm": 1}, "expected a list of names"),
    ],
)
def test_the_error_says_which_type_is_expected(kind, key, value, words, tmp_path):
    saved(kind, tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(CheckpointError, match=f"sets {key}=.*{words}"):
        load(tmp_path / "a")
