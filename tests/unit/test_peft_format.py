"""Adapters in peft's layout: the same logits as peft, read and written.

The files are made by a formula, so that peft's logits could be frozen; the peft that is installed is asked as well.
"""

import json
import logging

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from conftest import tiny_config
from easyllm.adapters import LoRAConfig, attach, detach, load_adapter, merge, save_adapter
from easyllm.core.errors import CheckpointError, ConfigError
from easyllm.models import add_adapter, hf_module_name, load_model, save_model, to_classifier
from easyllm.models.families import family_of
from easyllm.nn import Decoder
from easyllm.quant import quantize_weights

IDS = torch.arange(5, 45)
COLUMNS = [0, 7, 100]
PREFIX = "base_model.model."
ATTENTION = "model.layers.{}.self_attn.{}"


def formula(name, shape, scale):
    """Numbers that depend on nothing but their name: sin, in fp64."""
    step = 0.37 + sum(name.encode()) % 97 / 100
    return torch.from_numpy(np.sin(np.arange(np.prod(shape)) * step) * scale).reshape(shape).float()


def build(labels=None, **changes):
    """A Llama of two layers whose weights are the formula's."""
    model = Decoder(family_of("llama").read_config(tiny_config(**changes)))
    if labels is not None:
        to_classifier(model, labels)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = parameter.ndim == 1
            parameter.copy_(formula(name, parameter.shape, 0.25) + is_norm)
    return model.requires_grad_(False).eval()


def lora(modules, rank=2, scale=0.2):
    """A and B of linears by their names."""
    sizes = {"q_proj": (32, 64), "v_proj": (32, 32), "o_proj": (64, 32), "lm_head": (32, 320)}
    found = {}
    for module in modules:
        inputs, outputs = sizes[module.rsplit(".", 1)[-1]]
        its_rank = rank(module) if callable(rank) else rank
        found[f"{module}.lora_A.weight"] = (its_rank, inputs), scale
        found[f"{module}.lora_B.weight"] = (outputs, its_rank), scale
    return {name: formula(name, shape, size) for name, (shape, size) in found.items()}


def write(folder, tensors, **description):
    """A folder as peft leaves it: keys sorted, as its own are."""
    folder.mkdir()
    plain = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "r": 2, "lora_alpha": 6}
    plain |= {"target_modules": ["q_proj", "v_proj"], "inference_mode": True}
    text = json.dumps(plain | description, sort_keys=True)
    (folder / "adapter_config.json").write_text(text)
    prefixed = {PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(prefixed, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


QV = [ATTENTION.format(layer, name) for layer in (0, 1) for name in ("q_proj", "v_proj")]
NORMS = [f"model.layers.{n}.{w}_layernorm" for n in (0, 1) for w in ("input", "post_attention")]
TABLE = formula("a trained table", (320, 32), 0.3)


def one(names):
    return {f"{name}.weight": formula(f"trained {name}", (32,), 0.4) + 1 for name in names}


CASES = {
    # name: (of the base, tensors, keys of the configuration)
    "plain": ({}, lora(QV), {}),
    "fp16": ({}, {n: t.half() for n, t in lora(QV).items()}, {}),
    "rank-stabilised": ({}, lora(QV), {"use_rslora": True}),
    "dropout": ({}, lora(QV), {"lora_dropout": 0.3}),
    "how values started": ({}, lora(QV), {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}),
    "several alphas fit": (
        {},
        lora(QV),
        {"alpha_pattern": {"q_proj": 64, r"layers\.0\.self_attn\.q_proj": 3, "v_proj": 9}},
    ),
    "ranks by pattern": (
        {},
        lora(QV, rank=lambda module: 4 if "1.self_attn.v" in module else 2),
        {"rank_pattern": {r"layers\.1.*v_proj": 4}, "use_rslora": True},
    ),
    "norm is the end of other names": (
        {},
        lora(QV) | one(["model.norm", *NORMS]),
        {"modules_to_save": ["norm"]},
    ),
    "model.norm": ({}, lora(QV) | one(["model.norm"]), {"modules_to_save": ["model.norm"]}),
    "tied, embedding trained": (
        {},
        lora(QV) | {"model.embed_tokens.weight": TABLE},
        {"modules_to_save": ["embed_tokens"]},
    ),
    "tied, head trained": (
        {},
        lora(QV) | {"lm_head.weight": TABLE},
        {"modules_to_save": ["lm_head"]},
    ),
    "tied, stays tied": (
        {},
        lora(QV) | {"lm_head.weight": TABLE, "model.embed_tokens.weight": TABLE.clone()},
        {
            "modules_to_save": ["embed_tokens", "model.embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
    "tied, head adapted": (
        {},
        lora(["lm_head", QV[0]])
        | {"lm_head.base_layer.weight": formula("embed_tokens.weight", (320, 32), 0.25)},
        {"target_modules": ["lm_head", "model.layers.0.self_attn.q_proj"]},
    ),
    "head adapted": (
        {"tie_word_embeddings": False},
        lora(["lm_head", QV[0]])
        | {"lm_head.base_layer.weight": formula("lm_head.weight", (320, 32), 0.25)},
        {"target_modules": ["lm_head", "model.layers.0.self_attn.q_proj"]},
    ),
    "head of labels": (
        {"labels": 3},
        lora(QV) | {"score.weight": formula("trained score", (3, 32), 0.5)},
        {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]},
    ),
}
GOLDEN = {
    "plain": (0.21712, -0.48298, 0.49043),
    "fp16": (0.21711, -0.48296, 0.49040),
    "rank-stabilised": (0.22748, -0.52844, 0.53707),
    "dropout": (0.21712, -0.48298, 0.49043),
    "how values started": (0.21712, -0.48298, 0.49043),
    "several alphas fit": (0.17358, -0.43587, 0.44367),
    "ranks by pattern": (0.23347, -0.53338, 0.54191),
    "norm is the end of other names": (0.19186, -0.45944, 0.46723),
    "model.norm": (0.15923, -0.45287, 0.46199),
    "tied, embedding trained": (0.08539, 0.05843, -0.06471),
    "tied, head trained": (0.18111, 0.18807, -0.05946),
    "tied, stays tied": (-0.43944, 1.12703, 0.87308),
    "tied, head adapted": (0.18135, -0.52498, 0.28401),
    "head adapted": (0.08008, 0.06064, -0.17744),
    "head of labels": (0.26859, -0.07724, -0.16613),
}
"""Of peft 0.21.2 with transformers 5.24.0: columns 0, 7 and 100 of the last row of logits, or the scores."""


def logits(model):
    return model.logits(IDS)[-1]


def of_peft(base_folder, adapter, labels):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
    model = PeftModel.from_pretrained(kind.from_pretrained(base_folder), adapter).eval()
    with torch.no_grad():
        out = model(IDS[None]).logits[0]
    return out if labels else out[-1]


def file_tensors(folder):
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return {name.removeprefix(PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


# ---- read


@pytest.mark.filterwarnings("ignore")  # peft's own, of tied weights
@pytest.mark.parametrize("name", CASES)
def test_an_adapter_gives_the_logits_of_peft(name, tmp_path):
    base, tensors, keys = CASES[name]
    labels = base.get("labels")
    save_model(build(**base), tmp_path / "base")
    write(tmp_path / "a", tensors, **keys)
    got = logits(load_model(tmp_path / "base", adapter=tmp_path / "a"))
    frozen = torch.tensor(GOLDEN[name])
    torch.testing.assert_close(got[[0, 1, 2] if labels else COLUMNS], frozen, atol=2e-5, rtol=0)
    expected = of_peft(tmp_path / "base", tmp_path / "a", labels)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_dropout_acts_in_training_alone(tmp_path):
    write(tmp_path / "a", lora(QV), lora_dropout=0.5)
    model = add_adapter(build(), tmp_path / "a")
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    adapters = attach(build(), LoRAConfig(rank=2, dropout=0.5, targets=("q_proj",)))
    assert not any(adapter.training for _, adapter in adapters.linears.values())


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("tied", "norm"))])
def test_a_detached_adapter_leaves_the_base_as_it_was(name, tmp_path):
    base, tensors, keys = CASES[name]
    write(tmp_path / "a", tensors, **keys)
    model = add_adapter(build(**base), tmp_path / "a")
    assert not torch.allclose(logits(model), logits(build(**base)), atol=1e-3)
    assert torch.equal(logits(detach(model)), logits(build(**base)))


def test_a_merged_model_keeps_a_head_that_is_no_longer_tied(tmp_path):
    _, tensors, keys = CASES["tied, embedding trained"]
    write(tmp_path / "a", tensors, **keys)
    model = add_adapter(build(), tmp_path / "a")
    expected = logits(model)
    save_model(merge(model), tmp_path / "merged")
    again = load_model(tmp_path / "merged")
    torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=0)
    assert not again.config.tie_embeddings


def test_a_tied_pair_that_an_adapter_parts_is_refused_where_the_model_may_not_change(tmp_path):
    _, tensors, keys = CASES["tied, head trained"]
    model = build()
    write(tmp_path / "a", tensors, **keys)
    with pytest.raises(CheckpointError, match="one of two tied matrices of this model"):
        load_adapter(model, tmp_path / "a", module_name=hf_module_name(model))


def test_an_adapter_of_a_tied_head_is_held_by_name(tmp_path):
    _, tensors, keys = CASES["tied, head adapted"]
    write(tmp_path / "a", tensors, **keys)
    alone = logits(add_adapter(build(), tmp_path / "a"))
    model = add_adapter(build(), tmp_path / "a", name="one")
    got = model.logits(IDS, adapter="one")[-1]
    torch.testing.assert_close(got, alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        model.logits(IDS, adapter="")[-1], logits(build()), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("order", [("one", "two"), ("two", "one")])
def test_a_head_is_tied_again_when_no_adapter_changes_it(order, tmp_path):
    _, tensors, keys = CASES["tied, head adapted"]
    write(tmp_path / "a", tensors, **keys)
    base = logits(build())
    model = build()
    for name in ("one", "two"):
        add_adapter(model, tmp_path / "a", name=name)
    both = model.logits(IDS, adapter=order[1])[-1]
    detach(model, order[0])
    torch.testing.assert_close(model.logits(IDS, adapter=order[1])[-1], both, atol=0, rtol=0)
    assert model.lm_head is not None
    detach(model, order[1])
    assert model.lm_head is None
    assert model.config.tie_embeddings
    torch.testing.assert_close(logits(model), base, atol=0, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_of_the_head_works_on_a_quantized_base(tied, tmp_path):
    _, tensors, keys = CASES["tied, head adapted" if tied else "head adapted"]
    write(tmp_path / "a", tensors, **keys)
    model = quantize_weights(build(tie_word_embeddings=tied), "int8")
    base = logits(model)
    add_adapter(model, tmp_path / "a")
    change = logits(model) - base
    full = build(tie_word_embeddings=tied)
    expected = logits(add_adapter(full, tmp_path / "a")) - logits(build(tie_word_embeddings=tied))
    assert (change - expected).abs().max() < 0.1 * expected.abs().max()


def test_several_alphas_that_fit_are_told_of(tmp_path, caplog):
    _, tensors, keys = CASES["several alphas fit"]
    write(tmp_path / "a", tensors, **keys)
    with caplog.at_level(logging.WARNING):
        add_adapter(build(), tmp_path / "a")
    assert "several values for model.layers.0.self_attn.q_proj (3, 64)" in caplog.text
    assert "0 more modules" in caplog.text


def test_of_several_ranks_that_fit_the_one_of_the_tensors_counts(tmp_path):
    ranks = {
        r"layers\.0\.self_attn\.q_proj": 7,
        "q_proj": 4,
        "v_proj": 4,
    }  # sorted, as peft saves them
    write(tmp_path / "a", lora(QV, rank=4), rank_pattern=ranks)
    model = add_adapter(build(), tmp_path / "a")
    assert {a.lora_A.shape[0] for _, a in model.adapter_sets[""].linears.values()} == {4}
    write(tmp_path / "b", lora(QV, rank=4), r=4)
    same = add_adapter(build(), tmp_path / "b")
    torch.testing.assert_close(logits(model), logits(same), atol=1e-6, rtol=0)
    write(tmp_path / "c", lora(QV, rank=3), rank_pattern=ranks)
    with pytest.raises(CheckpointError, match="has rank 3 in the adapter's file and 7 in its conf"):
        add_adapter(build(), tmp_path / "c")


@pytest.mark.parametrize(
    ("kept", "saved", "missing"),
    [
        (["model.norm"], ["norm"], "model.layers.0.input_layernorm.weight"),
        (["model.norm"], ["model.norm", "q_proj"], "model.layers.0.self_attn.q_proj.weight"),
        ([], ["embed_tokens"], "model.embed_tokens.weight"),
    ],
)
def test_a_module_that_was_trained_whole_and_is_missing_is_named(kept, saved, missing, tmp_path):
    write(tmp_path / "a", lora(QV[1:2]) | one(kept), modules_to_save=saved)
    with pytest.raises(CheckpointError, match=f"{saved[-1]}.*contains no {missing}"):
        add_adapter(build(), tmp_path / "a")


def test_a_whole_module_of_another_model_is_refused(tmp_path):
    wide = {"model.norm.weight": torch.ones(48)}
    write(tmp_path / "a", lora(QV) | wide, modules_to_save=["model.norm"])
    with pytest.raises(CheckpointError, match=r"norm.weight: got \[48\], expected \[32\]"):
        add_adapter(build(), tmp_path / "a")
    write(tmp_path / "b", lora(QV) | one(["model.layers.7.input_layernorm"]))
    with pytest.raises(CheckpointError, match=r"1 unexpected, such as model\.layers\.7"):
        add_adapter(build(), tmp_path / "b")


def test_what_was_trained_whole_cannot_be_held_by_name(tmp_path):
    write(tmp_path / "a", lora(QV) | one(["model.norm"]), modules_to_save=["model.norm"])
    with pytest.raises(ConfigError, match="trained with norm of the base"):
        add_adapter(build(), tmp_path / "a", name="one")


# ---- written


def trained(model, config):
    adapters = attach(model, config)
    with torch.no_grad():
        for name, parameter in adapters.trained_parameters(model).items():
            parameter.copy_(parameter + formula(name, parameter.shape, 0.2))
    return adapters


@pytest.mark.parametrize(
    ("also_trained", "base", "modules"),
    [
        (("norm",), {}, ["model.norm"]),
        (
            ("layers.1.feed_forward",),
            {},
            [f"model.layers.1.mlp.{name}_proj" for name in ("down", "gate", "up")],
        ),
        (("layers.0.mixer.o_proj",), {}, ["model.layers.0.self_attn.o_proj"]),
        (("embed_tokens",), {}, ["lm_head", "model.embed_tokens"]),
        (("embed_tokens",), {"tie_word_embeddings": False}, ["model.embed_tokens"]),
        (("lm_head",), {"tie_word_embeddings": False}, ["lm_head"]),
        (("score",), {"labels": 2}, ["score"]),
        ((), {"labels": 2}, ["score"]),
    ],
)
@pytest.mark.filterwarnings("ignore")  # peft's own, of tied weights
def test_what_is_trained_whole_is_saved_for_peft(also_trained, base, modules, tmp_path):
    model = build(**base)
    save_model(model, tmp_path / "base")
    adapters = trained(model, LoRAConfig(rank=2, alpha=6, also_trained=also_trained))
    assert not any(name in adapters.linears for name in also_trained)
    expected = logits(model)
    save_adapter(model, tmp_path / "a", module_name=hf_module_name(model), base="x")
    description = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert description["modules_to_save"] == modules
    got = of_peft(tmp_path / "base", tmp_path / "a", base.get("labels"))
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
    again = load_model(tmp_path / "base", adapter=tmp_path / "a")
    torch.testing.assert_close(logits(again), expected, atol=1e-6, rtol=0)
    assert again.config.tie_embeddings == model.config.tie_embeddings


def test_a_matrix_that_is_kept_transposed_is_saved_so_and_read_back(tmp_path):
    hf = {"model_type": "gpt2", "vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4}
    hf |= {"n_positions": 64, "n_inner": 64, "tie_word_embeddings": True}

    def fresh():
        model = Decoder(family_of("gpt2").read_config(hf))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(formula(name, parameter.shape, 0.25) + (parameter.ndim == 1))
        return model.requires_grad_(False).eval()

    model = fresh()
    trained(
        model, LoRAConfig(rank=2, targets=("up_proj",), also_trained=("layers.0.mixer.o_proj",))
    )
    expected = logits(model)
    save_adapter(model, tmp_path / "a", module_name=hf_module_name(model), base="x")
    saved = file_tensors(tmp_path / "a")["transformer.h.0.attn.c_proj.weight"]
    assert torch.equal(saved.T, model.layers[0].mixer.o_proj.weight)
    assert torch.equal(logits(add_adapter(fresh(), tmp_path / "a")), expected)


def test_adapters_held_by_name_share_a_head_of_labels_that_was_not_trained(tmp_path):
    model = build(labels=2)
    trained(model, LoRAConfig(rank=2, targets=("q_proj",)))
    expected = logits(model)
    save_adapter(model, tmp_path / "a", module_name=hf_module_name(model), base="x")
    again = add_adapter(build(labels=2), tmp_path / "a", name="one")
    torch.testing.assert_close(again.logits(IDS, adapter="one")[-1], expected, atol=1e-6, rtol=0)
