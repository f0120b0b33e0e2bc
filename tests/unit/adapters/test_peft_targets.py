"""An adapter file must contain what its configuration says is adapted."""

import json

import pytest

from easyllm.adapters import LoRAConfig, attach, save_adapter
from easyllm.adapters.peft_targets import is_target
from easyllm.core.errors import CheckpointError
from easyllm.models import add_adapter, hf_module_name
from tiny_models import build_tiny

CONFIG = LoRAConfig(rank=2, targets=("q_proj", "down_proj"))
NAME = "model.layers.2.self_attn.q_proj"


@pytest.mark.parametrize(
    ("description", "expected"),
    [
        ({}, False),
        ({"target_modules": ["q_proj"]}, True),
        ({"target_modules": ["proj"]}, False),
        ({"target_modules": [NAME]}, True),
        ({"target_modules": r".*\.q_proj"}, True),
        ({"target_modules": r"q_proj"}, False),
        ({"target_modules": "(a*)*"}, False),
        ({"target_modules": "("}, False),
        ({"target_modules": ["q_proj"], "exclude_modules": ["layers.2.self_attn.q_proj"]}, False),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*layers\.2\..*"}, False),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 1]}, False),
        ({"target_modules": ["q_proj"], "layers_to_transform": 2}, True),
    ],
)
def test_targets_follow_the_rules_of_peft(description, expected):
    assert is_target(description, NAME) is expected


@pytest.fixture
def saved(tmp_path):
    """Saves an adapter of a model of two layers, with changes to its configuration."""

    def save(config=CONFIG, **changes):
        model = build_tiny()
        attach(model, config)
        names = hf_module_name(model)
        folder = save_adapter(model, tmp_path / "adapter", module_name=names, base="tiny")
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return folder

    return save


DEEPER = {"num_hidden_layers": 4}


def test_an_adapter_of_a_shallower_model_is_refused(saved):
    model = build_tiny(**DEEPER)
    with pytest.raises(CheckpointError, match=r"4 missing, such as model\.layers\.2.*trained on"):
        add_adapter(model, saved())
    assert not model.is_adapted


def test_layers_that_the_configuration_leaves_out_are_not_missed(saved):
    add_adapter(build_tiny(**DEEPER), saved(layers_to_transform=[0, 1]))


def test_an_adapter_of_chosen_layers_fits_a_deeper_model(saved):
    add_adapter(build_tiny(**DEEPER), saved(LoRAConfig(rank=2, targets=("layers.1.mixer.q_proj",))))


def test_a_tied_head_that_is_listed_must_be_in_the_file(saved):
    with pytest.raises(CheckpointError, match=r"contains no lm_head\.weight"):
        add_adapter(build_tiny(), saved(modules_to_save=["lm_head"]))


def test_a_tied_head_may_be_stored_as_the_embedding(saved):
    config = LoRAConfig(rank=2, targets=("q_proj",), also_trained=("embed_tokens",))
    folder = saved(config)
    assert "lm_head" in json.loads((folder / "adapter_config.json").read_text())["modules_to_save"]
    add_adapter(build_tiny(), folder)
