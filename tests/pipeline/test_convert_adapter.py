"""`easyllm convert ADAPTER OUT --lora-rank R` writes a LoRA adapter, and says what is lost."""

import json

import pytest
import torch

from easyllm.adapters import AdaLoRAConfig, DoRAConfig, IA3Config, LoRAConfig, save_adapter
from easyllm.core.manifest import MANIFEST_FILE
from easyllm.models import hf_module_name, load_model
from easyllm_command import easyllm
from tiny_models import build_tiny
from trained_adapters import attached

IDS = torch.arange(5, 45)


def saved(folder, base, config, *, recorded=None, **options):
    model = attached(load_model(base), config, **options)
    names = hf_module_name(model)
    return save_adapter(model, folder, module_name=names, base=recorded or str(base))


@pytest.mark.parametrize(
    "config",
    [DoRAConfig(rank=3), AdaLoRAConfig(init_rank=4, rank=2), IA3Config()],
    ids=lambda config: config.kind,
)
def test_an_adapter_becomes_lora_that_peft_reads(tiny_folder, tmp_path, config):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = saved(tmp_path / "a", tiny_folder, config)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}\n')
    out = tmp_path / "lora"
    done = easyllm("convert", folder, out, "--lora-rank", 64, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["folder"] == str(out)
    assert found["error"] < 1e-4
    assert set(found["layers"]) == set(
        load_model(tiny_folder, adapter=out).adapter_sets[""].linears
    )
    expected = load_model(tiny_folder, adapter=folder).logits(IDS)
    ours = load_model(tiny_folder, adapter=out).logits(IDS)
    torch.testing.assert_close(ours, expected, atol=2e-3, rtol=1e-3)
    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), out)
    with torch.no_grad():
        theirs = reference(IDS[None]).logits[0]
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    described = json.loads((out / "adapter_config.json").read_text())
    assert described["peft_type"] == "LORA"
    assert not described.get("use_dora")
    assert described["base_model_name_or_path"] == str(tiny_folder)
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 5]
    assert json.loads((out / MANIFEST_FILE).read_text())["results"]["error"] == found["error"]


def test_the_table_shows_what_a_low_rank_loses(tiny_folder, tmp_path):
    folder = saved(tmp_path / "a", tiny_folder, LoRAConfig(rank=4, targets=("q_proj", "v_proj")))
    done = easyllm("convert", folder, tmp_path / "lora", "--lora-rank", 2)
    assert done.returncode == 0, done.stderr
    rows = {
        line.split("│")[1].strip(): line.split("│")[2:]
        for line in done.stdout.splitlines()
        if line.startswith("│")
    }
    assert list(rows) == ["q_proj", "v_proj", "all"]
    assert [cell.strip() for cell in rows["q_proj"][:2]] == ["2", "2"]
    lost = [float(row[2].strip().removesuffix("%")) for row in rows.values()]
    assert min(lost[:2]) < lost[2] < max(lost[:2])
    assert "layers." in rows["q_proj"][3]
    assert done.stdout.endswith(f"\n{tmp_path / 'lora'}\n")


def test_a_base_that_is_missing_is_given(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = saved(tmp_path / "a", tiny_folder, LoRAConfig(rank=2), recorded="runs/base")
    (tmp_path / "runs").mkdir()
    missing = easyllm("convert", folder, tmp_path / "x", "--lora-rank", 2)
    assert missing.returncode == 2
    assert f"give the base model and --adapter {folder}" in missing.stderr
    words = ("convert", tiny_folder, tmp_path / "y", "--adapter", folder, "--lora-rank", 2)
    assert easyllm(*words).returncode == 0
    described = json.loads((tmp_path / "y" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(tiny_folder)


def test_what_cannot_be_converted_is_refused_and_writes_nothing(tiny_folder, tmp_path):
    folder = saved(tmp_path / "a", tiny_folder, LoRAConfig(rank=2))
    out = tmp_path / "results" / "out"
    for words, message in (
        ((tiny_folder, out, "--lora-rank", 2), "is a model; give the folder of an adapter"),
        ((folder, out, "--lora-rank", 2, "--dtype", "bfloat16"), "--dtype changes a model"),
        ((folder, out, "--lora-rank", 2, "--kv-heads", 1), "--kv-heads changes a model"),
        ((folder, out, "--lora-rank", 2, "--rope", "yarn"), "--rope changes a model"),
        ((tiny_folder, out, "--adapter", folder), "--adapter is converted with --lora-rank"),
        ((folder, out), "merge it first"),
    ):
        done = easyllm("convert", *words)
        assert done.returncode == 2, words
        assert message in done.stderr
    from easyllm.models import save_model

    biased = save_model(build_tiny(attention_bias=True), tmp_path / "biased")
    ia3 = saved(tmp_path / "i", biased, IA3Config())
    done = easyllm("convert", ia3, out, "--lora-rank", 2)
    assert done.returncode == 2
    assert "also changes the bias of layers.0.mixer.k_proj" in done.stderr
    assert not out.parent.exists() or not list(out.parent.iterdir())
