"""Law 8: merged = attached, step 0 = base, and `peft` reads the saved files."""

import json

import pytest
import torch

from easyllm.adapters import (
    LoRAConfig,
    adapter_of,
    adapter_parameters,
    attach,
    detach,
    load_adapter,
    merge,
    save_adapter,
)
from easyllm.core.errors import CheckpointError, ConfigError
from easyllm.models import hf_module_name
from tiny_models import build_tiny

IDS = torch.arange(5, 45)


def trained_adapter(config=None, seed=0):
    """A tiny model with an adapter whose B matrices are random, as after training."""
    model = build_tiny()
    attach(model, config or LoRAConfig(rank=4, alpha=8), seed=seed)
    randomise(model, seed=seed)
    return model


def randomise(model, *, seed=0, std=0.1):
    generator = torch.Generator().manual_seed(seed)
    for _, adapter in adapter_of(model).linears.values():
        torch.nn.init.normal_(adapter.lora_B, std=std, generator=generator)


def test_a_fresh_adapter_leaves_outputs_bitwise_unchanged():
    model = build_tiny()
    before = model.logits(IDS)
    attach(model, LoRAConfig(rank=4))
    assert torch.equal(model.logits(IDS), before)


def test_merged_equals_attached_and_differs_from_base():
    model = trained_adapter()
    attached = model.logits(IDS)
    merged = merge(model).logits(IDS)
    torch.testing.assert_close(merged, attached, atol=2e-5, rtol=0)
    assert not torch.allclose(merged, build_tiny().logits(IDS), atol=1e-2)
    assert not adapter_parameters(model)


def test_detached_equals_base():
    assert torch.equal(detach(trained_adapter()).logits(IDS), build_tiny().logits(IDS))


def test_only_adapters_are_trained():
    model = trained_adapter()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == set(adapter_parameters(model))
    assert len(trained) == 2 * 7 * 2  # two matrices, seven linears, two layers


def test_a_saved_adapter_loads_back_equal(tmp_path):
    config = LoRAConfig(rank=3, alpha=5, targets=("q_proj", "down_proj"))
    model = trained_adapter(config)
    save_adapter(model, tmp_path / "a", module_name=hf_module_name(model), base="tiny")
    again = build_tiny()
    load_adapter(again, tmp_path / "a", module_name=hf_module_name(model))
    assert torch.equal(again.logits(IDS), model.logits(IDS))


def test_peft_loads_the_saved_adapter_with_equal_logits(tmp_path, tiny_folder):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = LoRAConfig(rank=4, alpha=8)
    model = trained_adapter(config)
    save_adapter(model, tmp_path / "a", module_name=hf_module_name(model), base=str(tiny_folder))
    reference = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path / "a"
    )
    with torch.no_grad():
        expected = reference(IDS[None]).logits[0]
    torch.testing.assert_close(model.logits(IDS), expected, atol=3e-5, rtol=0)


def test_adapter_of_another_model_is_refused(tmp_path):
    config = LoRAConfig(rank=4)
    model = trained_adapter(config)
    save_adapter(model, tmp_path / "a", module_name=hf_module_name(model), base="tiny")
    other = build_tiny(hidden_size=48, num_hidden_layers=3)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_adapter(other, tmp_path / "a", module_name=hf_module_name(other))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        load_adapter(other, tmp_path, module_name=hf_module_name(other))


def test_an_unsupported_kind_of_adapter_is_refused(tmp_path):
    config = LoRAConfig(rank=4)
    model = trained_adapter(config)
    folder = save_adapter(model, tmp_path / "a", module_name=hf_module_name(model), base="tiny")
    description = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(description | {"lora_bias": True}))
    with pytest.raises(CheckpointError, match="lora_bias=True, which is not implemented"):
        load_adapter(build_tiny(), folder, module_name=hf_module_name(model))


def test_unknown_target_is_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean 'q_proj'"):
        attach(build_tiny(), LoRAConfig(targets=("qproj",)))


def test_step_zero_and_merge_hold_for_a_bf16_base():
    model = build_tiny().to(torch.bfloat16)
    before = model.logits(IDS)
    attach(model, LoRAConfig(rank=4))
    assert torch.equal(model.logits(IDS), before)
    randomise(model, std=0.05)
    attached = model.logits(IDS)
    drift = (merge(model).logits(IDS) - attached).abs().max()
    assert drift < 0.1 * attached.abs().max()  # each weight is rounded to bf16 once
