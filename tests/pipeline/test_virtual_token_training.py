"""Training runs of prompt-learning adapters: resumed bitwise, saved folded, refused in time."""

import json

import pytest
import torch
from safetensors.torch import load_file

from easyllm.core.errors import ConfigError
from easyllm.models import load_model
from easyllm.train import dry_run, train
from tiny_models import CORPUS
from train_twice import run_config, train_twice

KINDS = {
    "prompt": {"kind": "prompt", "num_virtual_tokens": 4},
    "ptuning": {
        "kind": "ptuning",
        "num_virtual_tokens": 4,
        "encoder": "lstm",
        "encoder_hidden_size": 8,
        "encoder_dropout": 0.3,
    },
    "prefix": {"kind": "prefix", "num_virtual_tokens": 4, "projection": True},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    values = [{"prompt": line[:12], "completion": line[12:30]} for line in dict.fromkeys(CORPUS)]
    text = "".join(json.dumps(row) + "\n" for row in values * 2)
    (folder / "tune.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_has_the_same_encoder_and_the_same_file(kind, rows, tiny_folder, tmp_path):
    """The file contains the folded table; the checkpoint the encoder, dropout's state included."""
    train_twice(run_config(rows, tiny_folder, adapter=KINDS[kind]), tmp_path)
    runs = [tmp_path / "whole", tmp_path / "broken"]
    newest = [next((run / "checkpoints").glob("step-*")) / "state.safetensors" for run in runs]
    there, here = (load_file(path) for path in newest)
    assert set(there) == set(here)
    assert all(torch.equal(there[name], here[name]) for name in there)
    assert any("table.encoder." in name for name in there) == (kind != "prompt")
    (table,) = load_file(runs[0] / "adapter" / "adapter_model.safetensors").values()
    assert table.shape == (4, 128 if kind == "prefix" else 32)
    model = load_model(tiny_folder, dtype="float32", adapter=runs[0] / "adapter")
    assert model.num_virtual_tokens == 4


def test_a_text_is_encoded_with_the_tokenizer_of_the_model(
    rows, tiny_folder, tmp_path, tiny_tokenizer
):
    text = "The quick brown fox"
    adapter = {"kind": "prompt", "num_virtual_tokens": 3, "init": "text", "init_text": text}
    still = {"kind": "sgd", "learning_rate": 1e-30}
    config = run_config(rows, tiny_folder, adapter=adapter, optimizer=still, max_steps=1)
    dry_run(config, None)
    train(config, tmp_path / "run")
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    ids = torch.tensor(tiny_tokenizer.encode(text)[:3])
    base = load_model(tiny_folder, dtype="float32")
    assert torch.equal(tensors["prompt_embeddings"], base.embed_tokens(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_cannot_start_is_refused_by_its_dry_run(kind, rows, tiny_folder):
    adapter = KINDS[kind] | {"num_virtual_tokens": 256}
    with pytest.raises(ConfigError, match="num_virtual_tokens=256 leaves no position"):
        dry_run(run_config(rows, tiny_folder, adapter=adapter), None)
    adapter["num_virtual_tokens"] = 250
    with pytest.raises(ConfigError, match="longer than the model's context of 6"):
        dry_run(run_config(rows, tiny_folder, adapter=adapter), None)
