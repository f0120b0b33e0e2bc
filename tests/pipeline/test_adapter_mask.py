"""An adapter trained under `prompt_mask: prefix` is used under that mask by every command."""

import json
import shutil

import pytest
import torch

from easyllm.adapters import LoRAConfig, attach, detach, save_adapter
from easyllm.adapters.base_settings import SETTINGS_FILE
from easyllm.cli.adapter import load_served
from easyllm.core.errors import CheckpointError, ConfigError
from easyllm.engine import LLM
from easyllm.models import add_adapter, hf_module_name, load_model, split_adapter
from easyllm_command import RECIPE, easyllm


@pytest.fixture(scope="module")
def adapter(tiny_folder, tmp_path_factory):
    """An adapter with random values, trained under the prefix mask."""
    model = load_model(tiny_folder)
    model.config = model.config.changed(prompt_mask="prefix")
    adapters = attach(model, LoRAConfig(rank=4, alpha=64))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapters.trained_parameters(model).values():
            parameter.normal_(std=0.2, generator=generator)
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    names = hf_module_name(model)
    return save_adapter(model, folder, module_name=names, base=str(tiny_folder))


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "one two three four", "completion": "five six"}) + "\n")
    return path


def loss(model, rows, *words):
    done = easyllm("eval", model, rows, "--json", *words)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["loss_nats"]


def test_a_training_records_the_mask(tiny_folder, rows, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=tiny_folder, data=rows, output=tmp_path / "run"))
    done = easyllm(
        "train", recipe, "prompt_mask=prefix", "precision=fp32", f"data.eval=[{rows}]", "--json"
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run" / "adapter"
    assert json.loads((folder / SETTINGS_FILE).read_text()) == {"prompt_mask": "prefix"}
    figures = json.loads(done.stdout)
    assert loss(folder, rows) == pytest.approx(figures["eval_loss_nats"], abs=5e-3)


def test_loading_applies_the_mask_and_detaching_restores_it(tiny_folder, adapter):
    model = add_adapter(load_model(tiny_folder), adapter)
    assert model.config.prompt_mask == "prefix"
    assert detach(model).config.prompt_mask == "causal"
    assert LLM(adapter).model.config.prompt_mask == "prefix"


def test_merging_keeps_the_mask(tiny_folder, adapter, rows, tmp_path):
    done = easyllm("merge", tiny_folder, adapter, tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["prompt_mask"] == "prefix"
    assert loss(tmp_path / "merged", rows) == pytest.approx(loss(adapter, rows), abs=1e-4)
    causal = json.loads((tmp_path / "merged" / "config.json").read_text()) | {"prompt_mask": None}
    (tmp_path / "merged" / "config.json").write_text(json.dumps(causal))
    assert loss(tmp_path / "merged", rows) != pytest.approx(loss(adapter, rows), abs=1e-4)


def test_a_named_adapter_with_another_mask_is_refused_by_name(tiny_folder, adapter):
    model = load_model(tiny_folder)
    with pytest.raises(ConfigError, match=r"adapter 'mine' .* prompt_mask=prefix, but the model"):
        LLM(tiny_folder, model=model, adapters={"mine": adapter})
    assert model.config.prompt_mask == "causal"
    assert not model.adapter_sets


def test_a_server_gives_an_adapter_with_another_mask_its_own_copy(tiny_folder, adapter):
    served = load_served({"base": str(tiny_folder), "tuned": str(adapter)})
    loaded, selected = served.models, served.adapters
    masks = {name: llm.model.config.prompt_mask for name, llm in loaded.items()}
    assert masks == {"base": "causal", "tuned": "prefix"}
    assert selected == {}


def test_a_damaged_record_of_the_mask_is_refused(tiny_folder, adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    (folder / SETTINGS_FILE).write_text('{"prompt_mask": "sideways"}')
    with pytest.raises(CheckpointError, match="does not contain a valid prompt_mask"):
        add_adapter(load_model(split_adapter(folder)[0]), folder)
