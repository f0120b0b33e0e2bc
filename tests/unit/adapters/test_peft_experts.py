"""LoRA of experts in the layout of transformers 5, read and written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from easyllm.adapters import (
    DoRAConfig,
    LoRAConfig,
    PiSSAConfig,
    adapter_of,
    attach,
    load_adapter,
    save_adapter,
)
from easyllm.adapters.peft_experts import fuse_experts, split_experts
from easyllm.core.errors import CheckpointError
from easyllm.models import hf_module_name, load_model
from easyllm.models.families import family_of
from easyllm.nn import Decoder
from tiny_models import tiny_config

IDS = torch.arange(5, 45)
PREFIX = "base_model.model."
QWEN = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": QWEN,
    "qwen2_moe": QWEN | {"shared_expert_intermediate_size": 20},
}
ALL = LoRAConfig(rank=2, alpha=6)


def build(family="qwen3_moe", **changes):
    hf = tiny_config(model_type=family, tie_word_embeddings=False, **FAMILIES[family] | changes)
    model = Decoder(family_of(family).read_config(hf))
    model.reset_parameters(std=0.3, generator=torch.Generator().manual_seed(0))
    return model.requires_grad_(False).eval()


def adapted(config, family="qwen3_moe", **changes):
    model = build(family, **changes)
    adapters = attach(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapters.trained_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def saved(model, folder):
    save_adapter(model, folder, module_name=hf_module_name(model), base="tiny")
    values = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    return values, {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


CONFIGS = {
    "all linears": ALL,
    "experts alone": LoRAConfig(rank=2, targets=("*experts*",)),
    "gate and up": LoRAConfig(rank=2, targets=("*experts*gate_proj", "*experts*up_proj")),
    "gate": LoRAConfig(rank=2, targets=("*experts*gate_proj",)),
    "down": LoRAConfig(rank=2, targets=("*experts*down_proj", "q_proj")),
    "one expert": LoRAConfig(rank=2, targets=("layers.1*experts.2.*",)),
    "ranks and scales": LoRAConfig(
        rank=3,
        alpha=6,
        rslora=True,
        rank_pattern={"up_proj": 2, "layers.0*experts.1.down_proj": 1},
        alpha_pattern={"gate_proj": 5, "experts.2.down_proj": 7},
    ),
    "PiSSA": PiSSAConfig(rank=2),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_read_back_equal(name, family, tmp_path):
    model = adapted(CONFIGS[name], family)
    expected = model.logits(IDS)
    assert not torch.allclose(expected, build(family).logits(IDS), atol=1e-3)
    saved(model, tmp_path / "a")
    again = build(family)
    load_adapter(again, tmp_path / "a", module_name=hf_module_name(again))
    torch.testing.assert_close(again.logits(IDS), expected, atol=1e-5, rtol=1e-5)
    assert set(adapter_of(again).linears) == set(adapter_of(model).linears)
    ranks = [
        {n: len(a.lora_A) for n, (_, a) in adapter_of(m).linears.items()} for m in (again, model)
    ]
    if name != "PiSSA":  # of twice the rank, as a LoRA
        assert ranks[0] == ranks[1]
    saved(again, tmp_path / "b")
    third = build(family)
    load_adapter(third, tmp_path / "b", module_name=hf_module_name(third))
    torch.testing.assert_close(third.logits(IDS), again.logits(IDS), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")  # peft's own warnings
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("name", ["all linears", "gate and up", "ranks and scales"])
def test_peft_reads_what_is_written(name, family, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from easyllm.models import save_model

    model = adapted(CONFIGS[name], family)
    expected = model.logits(IDS)
    saved(model, tmp_path / "a")
    save_model(build(family), tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    reference = PeftModel.from_pretrained(base, tmp_path / "a").eval()
    with torch.no_grad():
        got = reference(IDS[None]).logits[0]
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)
    assert load_model(tmp_path / "base").config.family == family


def test_the_fused_matrices_have_the_layout_of_peft(tmp_path):
    model = adapted(ALL)
    values, tensors = saved(model, tmp_path / "a")
    stem, found = "model.layers.1.mlp.experts", adapter_of(model).linears
    experts, rank, inner = 4, 2, 24

    def matrices(expert, leaf):
        adapter = found[f"layers.1.feed_forward.experts.{expert}.{leaf}"][1]
        return adapter.lora_A, adapter.lora_B

    down_a, down_b = tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"]
    both_a = tensors[f"{stem}.base_layer.lora_A.weight"]
    both_b = tensors[f"{stem}.base_layer.lora_B.weight"]
    assert both_a.shape == (experts * 2 * rank, 32)
    for e in range(experts):
        (gate_a, gate_b), (up_a, up_b) = matrices(e, "gate_proj"), matrices(e, "up_proj")
        for i in range(rank):
            assert torch.equal(down_a[e * rank + i], matrices(e, "down_proj")[0][i])
            assert torch.equal(down_b[:, i * experts + e], matrices(e, "down_proj")[1][:, i])
            assert torch.equal(both_a[e * 2 * rank + i], gate_a[i])
            assert torch.equal(both_a[e * 2 * rank + rank + i], up_a[i])
            column = both_b[:, i * experts + e]
            assert torch.equal(column[:inner], gate_b[:, i])
            assert not bool(column[inner:].any())
            column = both_b[:, (rank + i) * experts + e]
            assert torch.equal(column[inner:], up_b[:, i])
            assert not bool(column[:inner].any())
    assert values["rank_pattern"][f"{stem}.gate_up_proj"] == 4
    assert values["alpha_pattern"][f"{stem}.gate_up_proj"] == 12
    assert values["rank_pattern"][f"{stem}.down_proj"] == 2
    leaves = {name.rpartition(".")[2] for name in values["target_modules"]}
    assert leaves == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert f"{stem}.gate_up_proj" in values["target_parameters"]
    assert "model.layers.1.mlp.gate.weight" in values["target_parameters"]


def test_mixtral_has_its_names_of_transformers_5(tmp_path):
    _, tensors = saved(adapted(ALL, "mixtral"), tmp_path / "a")
    assert not any("block_sparse_moe" in name for name in tensors)
    assert "model.layers.0.mlp.gate.lora_A.weight" in tensors


def test_a_shared_a_stays_shared():
    """A file of peft is not twice as large after it is read and written."""
    model = build()
    stem = "model.layers.0.mlp.experts"
    a, b = torch.randn(4 * 3, 32), torch.randn(2 * 24, 4 * 3)
    description = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": []}
    description["target_parameters"] = ["mlp.experts.gate_up_proj"]
    tensors = {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    where = hf_module_name(model)
    one, split = split_experts(model, where, description, tensors)
    assert len(split) == 2 * 2 * 4
    gate = split["model.layers.0.mlp.experts.3.gate_proj.lora_A.weight"]
    assert torch.equal(gate, a[9:12])
    up = split["model.layers.0.mlp.experts.3.up_proj.lora_B.weight"]
    assert torch.equal(up, b[24:, [3, 7, 11]])
    stems = {name.removesuffix(".lora_A.weight") for name in split if "lora_A" in name}
    again, fused = fuse_experts(model, where, one, split, stems)
    assert again["target_parameters"] == [f"{stem}.gate_up_proj"]
    assert all(torch.equal(fused[name], tensor) for name, tensor in tensors.items())
    assert len(fused) == 2


def test_names_of_transformers_4_are_still_read(tmp_path):
    model = adapted(CONFIGS["experts alone"], "mixtral")
    where = hf_module_name(model)
    folder = tmp_path / "a"
    saved(model, folder)
    tensors = {
        f"{PREFIX}{where(name)}.{ending}": parameter.detach().contiguous()
        for name, (_, adapter) in adapter_of(model).linears.items()
        for ending, parameter in adapter.file_tensors().items()
    }
    assert f"{PREFIX}model.layers.0.block_sparse_moe.experts.3.w1.lora_A.weight" in tensors
    save_file(tensors, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 32, "target_modules": ["w1", "w2", "w3"]}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    again = build("mixtral")
    load_adapter(again, folder, module_name=where)
    assert torch.equal(again.logits(IDS), model.logits(IDS))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {n: x for n, x in t.items() if "lora_B" not in n}, "do not fit each other"),
        (lambda t: {n: x[:-1] if "lora_A" in n else x for n, x in t.items()}, "do not fit each"),
        (
            lambda t: {n: x[:, :-4] if "lora_B" in n else x[:-4] for n, x in t.items()},
            "has 4 rows of lora_A in the adapter's file, expected 4 times the rank 2",
        ),
        (
            lambda t: {n: x[:, :-1] if "lora_A" in n else x for n, x in t.items()},
            "do not fit 4 experts with 24 inputs and 32 outputs",
        ),
    ],
)
def test_matrices_of_another_shape_are_refused_by_name(change, words, tmp_path):
    _, tensors = saved(adapted(LoRAConfig(rank=2, targets=("*experts*down_proj",))), tmp_path / "a")
    changed = {f"{PREFIX}{name}": t.contiguous() for name, t in change(tensors).items()}
    save_file(changed, tmp_path / "a" / "adapter_model.safetensors")
    model = build()
    with pytest.raises(CheckpointError, match=rf"model.layers.0.mlp.experts.*{words}"):
        load_adapter(model, tmp_path / "a", module_name=hf_module_name(model))


def test_other_methods_keep_a_linear_for_each_expert(tmp_path, caplog):
    model = adapted(DoRAConfig(rank=2, alpha=6))
    values, tensors = saved(model, tmp_path / "a")
    assert "target_parameters" not in values
    assert "model.layers.0.mlp.experts.3.up_proj.lora_magnitude_vector" in tensors
    assert "peft cannot read" in caplog.text
    again = build()
    load_adapter(again, tmp_path / "a", module_name=hf_module_name(again))
    torch.testing.assert_close(again.logits(IDS), model.logits(IDS), atol=1e-5, rtol=1e-5)
