"""The worked examples of docs/extend.md and docs/train.md work."""

import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from easyllm.adapters import adapter_of, attach, merge, save_adapter, unregister_adapter
from easyllm.core.config import load_config
from easyllm.models import hf_module_name, load_model
from easyllm.train import TrainConfig

ROOT = Path(__file__).parents[2]
IDS = torch.arange(5, 45)


def block(name, page="extend.md"):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (code,) = re.findall(rf"```python {name}\n(.*?)```", text, flags=re.DOTALL)
    return code


def test_the_documented_adapter_is_attached_saved_loaded_and_merged(tiny_folder, tmp_path):
    module = ModuleType("documented")
    exec(compile(block("adapter"), "docs/extend.md", "exec"), module.__dict__)
    try:
        model = load_model(tiny_folder, dtype="float32")
        before = model.logits(IDS)
        attach(model, module.IA3Config())
        assert torch.equal(model.logits(IDS), before)
        for _, adapter in adapter_of(model).linears.values():
            torch.nn.init.uniform_(adapter.scale, 0.5, 1.5)
        adapted = model.logits(IDS)
        name = hf_module_name(model)
        save_adapter(model, tmp_path / "a", module_name=name, base=str(tiny_folder))
        again = load_model(tiny_folder, dtype="float32", adapter=tmp_path / "a")
        assert torch.equal(again.logits(IDS), adapted)
        torch.testing.assert_close(merge(model).logits(IDS), adapted, atol=1e-4, rtol=1e-4)
    finally:
        unregister_adapter("input_scale")


def test_the_documented_program_trains_serves_and_merges(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    }
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 8)
    program = block("program").replace('"smollm2"', repr(str(tiny_folder)))
    try:
        names = {}
        exec(compile(block("adapter"), "docs/extend.md", "exec"), names)
        exec(compile(program, "docs/extend.md", "exec"), names)
        adapted = load_model(tiny_folder, adapter="runs/ia3/adapter").logits(IDS)
        merged = load_model("runs/ia3/merged").logits(IDS)
        torch.testing.assert_close(merged, adapted, atol=0.05, rtol=0.05)
    finally:
        unregister_adapter("input_scale")


@pytest.mark.parametrize("page", ["train.md", "train.zh.md"])
def test_the_documented_recipes_are_valid(tmp_path, page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    recipes = re.findall(r"```yaml recipe\n(.*?)```", text, flags=re.DOTALL)
    assert recipes
    for recipe in recipes:
        (tmp_path / "r.yaml").write_text(recipe)
        assert load_config(TrainConfig, tmp_path / "r.yaml").output == "runs/mine"


def test_the_documented_callback_stops_a_run_that_writes_its_page(
    tiny_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    row = {"prompt": "The quick brown", "completion": " fox jumps"}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 8)
    (tmp_path / "my-recipe.yaml").write_text(
        f"model: {tiny_folder}\noutput: run\nepochs: 5\ntensorboard: true\n"
        "data: {train: [rows.jsonl], max_seq_len: 64}\n"
    )
    program = block("callbacks", "train.md").replace("StopAtLoss(1.0)", "StopAtLoss(100.0)")
    exec(compile(program, "docs/train.md", "exec"), {})
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["results"]["steps"] == 1
    assert 'data-state="finished"' in (tmp_path / "run" / "report.html").read_text()
    assert any((tmp_path / "run" / "tensorboard").iterdir())
