"""The worked example of docs/models.md works."""

import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from easyllm.models import families, load_model, save_model
from gguf_writing import write
from tiny_hf import BASE, tiny_hf

ROOT = Path(__file__).parents[2]
MAX_LINES = 200


def example() -> str:
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python family\n(.*?)```", text, flags=re.DOTALL)
    return code


def test_the_documented_family_equals_transformers_in_both_directions(tmp_path, families_restored):
    module = ModuleType("starcoder2")
    exec(compile(example(), "docs/models.md", "exec"), module.__dict__)
    families.register_family(module.FAMILY)
    torch.manual_seed(0)
    values = BASE | {"initializer_range": 0.2, "sliding_window": 9}
    config = AutoConfig.for_model("starcoder2", **values, attn_implementation="eager")
    reference = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in reference.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    reference.save_pretrained(tmp_path / "hf")
    ids = torch.randint(0, 211, (60,))
    expected = reference(ids[None]).logits[0]
    model = load_model(tmp_path / "hf")
    torch.testing.assert_close(model.logits(ids), expected, atol=3e-5, rtol=0)
    save_model(model, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    torch.testing.assert_close(again(ids[None]).logits[0], expected, atol=1e-6, rtol=0)


def test_the_documented_family_is_read_from_gguf(tmp_path, families_restored):
    module = ModuleType("starcoder2")
    exec(compile(example(), "docs/models.md", "exec"), module.__dict__)
    families.register_family(module.FAMILY)
    reference = tiny_hf("starcoder2", {})
    ids = torch.randint(0, 211, (60,))
    model = load_model(write(tmp_path / "m.gguf", reference, "starcoder2"))
    torch.testing.assert_close(model.logits(ids), reference(ids[None]).logits[0], atol=3e-5, rtol=0)


SHARED = {"__init__.py", "family.py", "gguf_layout.py", "row_order.py", "rope_config.py"}


@pytest.mark.parametrize(
    "path",
    [p for p in Path(families.__file__).parent.glob("*.py") if p.name not in SHARED],
    ids=lambda p: p.stem,
)
def test_a_family_is_one_small_file(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES
    assert len(example().splitlines()) <= MAX_LINES
