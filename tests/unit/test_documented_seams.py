"""The worked example of docs/extend.md is an adapter that works."""

import re
from pathlib import Path
from types import ModuleType

import torch

from easyllm.adapters import adapter_of, attach, merge, save_adapter, unregister_adapter
from easyllm.models import hf_module_name, load_model

ROOT = Path(__file__).parents[2]
IDS = torch.arange(5, 45)


def test_the_documented_adapter_is_attached_saved_loaded_and_merged(tiny_folder, tmp_path):
    text = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python adapter\n(.*?)```", text, flags=re.DOTALL)
    module = ModuleType("documented")
    exec(compile(code, "docs/extend.md", "exec"), module.__dict__)
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
