"""Files of prompt-learning adapters, and what of them is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from easyllm.adapters import PrefixTuningConfig, PromptTuningConfig, PTuningConfig, adapter_of
from easyllm.core.errors import CheckpointError
from easyllm.models import add_adapter, to_classifier
from prompt_adapters import CONFIGS, adapted, load, save
from tiny_models import build_tiny

IDS = torch.arange(5, 45)
WIDTHS = {"prompt": 32, "ptuning mlp": 32, "ptuning lstm": 32, "prefix": 128, "prefix mlp": 128}


def described(folder, **changes):
    """Changes the configuration in a folder; returns it."""
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(values))
    return values


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_contains_the_table_and_describes_the_base(name, tmp_path):
    folder = save(adapted(build_tiny(), CONFIGS[name]), tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {
        "prompt_embeddings": (5, WIDTHS[name])
    }
    is_prefix = name.startswith("prefix")
    values = described(folder)
    assert values["num_virtual_tokens"] == 5
    assert values["token_dim"] == 32  # of the hidden size; of a layer's keys: 2 x 16
    assert values["num_attention_heads"] == (2 if is_prefix else 4)
    assert values["num_layers"] == 2
    assert "bias" not in values  # peft's prompt methods do not know it


def test_the_settings_of_an_encoder_are_recorded(tmp_path):
    lstm = {"encoder": "lstm", "encoder_num_layers": 3, "encoder_dropout": 0.25}
    for config in (
        PTuningConfig(encoder_hidden_size=8, **lstm),
        PTuningConfig(),
        PrefixTuningConfig(projection=True, encoder_hidden_size=8),
        PrefixTuningConfig(),
        PromptTuningConfig(),
    ):
        folder = save(adapted(build_tiny(), config), tmp_path / str(len(list(tmp_path.iterdir()))))
        assert adapter_of(load(build_tiny(), folder)).config == config


def test_a_classifier_has_its_head_under_the_name_of_peft(tmp_path):
    model = build_tiny()
    to_classifier(model, 3)
    adapted(model, CONFIGS["prompt"])
    with torch.no_grad():
        model.score.weight.normal_()
    folder = save(model, tmp_path / "a")
    assert set(load_file(folder / "adapter_model.safetensors")) == {
        "base_model.score.weight",
        "prompt_embeddings",
    }
    again = build_tiny()
    add_adapter(again, folder)
    assert torch.equal(again.logits(IDS), model.logits(IDS))


def test_modules_trained_along_have_the_names_of_peft(tmp_path):
    config = PromptTuningConfig(num_virtual_tokens=5, also_trained=("norm",))
    model = adapted(build_tiny(), config)
    folder = save(model, tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert set(tensors) == {"base_model.model.norm.weight", "prompt_embeddings"}
    assert torch.equal(load(build_tiny(), folder).logits(IDS), model.logits(IDS))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("prompt", {"num_virtual_tokens": 4}, "is 4, but prompt_embeddings has 5 rows"),
        ("prefix", {"num_virtual_tokens": 6}, "is 6, but prompt_embeddings has 5 rows"),
        ("prompt", {"num_virtual_tokens": None}, "does not describe a valid adapter"),
        ("prompt", {"token_dim": 48}, "a base model with token_dim=48, but this one has 32"),
        ("prefix", {"num_layers": 4}, "a base model with num_layers=4, but this one has 2"),
        ("prefix", {"num_attention_heads": 4}, "num_attention_heads=4, but this one has 2"),
        ("prompt", {"num_transformer_submodules": 2}, "num_transformer_submodules=2"),
        ("prompt", {"prompt_temperature": 2}, "prompt_temperature=2, which is not known"),
        ("ptuning mlp", {"encoder_depth": 2}, "encoder_depth=2, which is not known"),
        ("prefix", {"init_weights": "orthogonal"}, "init_weights='orthogonal'"),
    ],
)
def test_what_does_not_fit_is_refused(name, changes, message, tmp_path):
    folder = save(adapted(build_tiny(), CONFIGS[name]), tmp_path / "a")
    described(folder, **changes)
    model = build_tiny()
    with pytest.raises(CheckpointError, match=message):
        load(model, folder)
    assert not model.is_adapted


def test_keys_of_the_initial_values_are_ignored(tmp_path):
    model = adapted(build_tiny(), CONFIGS["prompt"])
    folder = save(model, tmp_path / "a")
    described(
        folder,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="Answer:",
        tokenizer_name_or_path="org/name",
        tokenizer_kwargs=None,
    )
    assert torch.equal(load(build_tiny(), folder).logits(IDS), model.logits(IDS))


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_tensors_of_another_base_are_refused(name, tmp_path):
    folder = save(adapted(build_tiny(), CONFIGS[name]), tmp_path / "a")
    for key in ("token_dim", "num_layers", "num_attention_heads"):
        described(folder, **{key: None})  # as older versions of peft may leave them
    wider = build_tiny(hidden_size=48, num_key_value_heads=4)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load(wider, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({"prompt_embedding": tensors["prompt_embeddings"]}, folder / "x.safetensors")
    (folder / "x.safetensors").replace(folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="1 missing, such as prompt_embeddings"):
        load(build_tiny(), folder)
