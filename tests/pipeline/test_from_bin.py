"""`easyllm convert --from-bin`: old pickled checkpoints, read in a process of their own."""

import json
import os
import pickle

import pytest
import torch

from authors_layouts import LAYOUTS
from easyllm.checkpoint.pickled import pickled_files, write_safetensors
from easyllm.core.errors import CheckpointError
from easyllm.models import load_model
from easyllm_command import easyllm


class Runs:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_two_pickled_shards_become_a_model_folder(tmp_path, tiny_tokenizer):
    layout, old = LAYOUTS["chatglm2"], tmp_path / "old"
    tensors = layout.tensors()
    old.mkdir()
    tiny_tokenizer.save(old)
    (old / "config.json").write_text(json.dumps(layout.config))
    (old / "modeling_chatglm.py").write_text("raise SystemExit('this code was run')")
    names, places = list(tensors), {}
    for number, part in enumerate((names[:9], names[9:])):
        file = f"pytorch_model-0000{number + 1}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, old / file)
        places |= dict.fromkeys(part, file)
    (old / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match=r"run easyllm convert FOLDER OUT --from-bin"):
        load_model(old)
    done = easyllm("convert", str(old), str(tmp_path / "new"), "--from-bin")
    assert done.returncode == 0, done.stderr
    ids = torch.arange(5, 45)
    expected = layout.logits(tensors, ids)
    ours = load_model(tmp_path / "new").logits(ids)
    torch.testing.assert_close(ours, expected, atol=3e-5, rtol=0)
    assert not list((tmp_path / "new").glob("*.py"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "old"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"w": Runs(os.system, "touch escaped")}, "cannot be read as tensors alone"),
        ({"w": 3}, "'w' is not a tensor"),
        ([1, 2], "a list, not tensors by name"),
    ],
)
def test_anything_but_tensors_is_refused(tmp_path, value, words):
    file = tmp_path / "pytorch_model.bin"
    torch.save(value, file, pickle_module=pickle)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=words):
        write_safetensors([file], tmp_path / "out")
    assert not list(tmp_path.rglob("escaped"))
    assert not list((tmp_path / "out").iterdir())


def test_an_index_that_leaves_its_folder_is_refused(tmp_path):
    index = {"weight_map": {"w": "../elsewhere.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside its folder"):
        pickled_files(tmp_path)
