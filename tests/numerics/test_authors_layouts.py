"""Families in the layout of their authors' code, against forward passes written from it."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from authors_layouts import LAYOUTS, Baichuan, ChatGLM2, write_folder
from easyllm.adapters import LoRAConfig, adapter_of, attach, merge, save_adapter
from easyllm.core.errors import CheckpointError
from easyllm.engine import Engine, Request, SamplingParams
from easyllm.engine.compiled_step import CompiledStep
from easyllm.models import add_adapter, hf_module_name, load_model, save_model
from easyllm.models.gguf_export import save_gguf
from easyllm.nn.context import ForwardContext, block_position_rows
from gguf_writing import write
from tiny_hf import tiny_hf

CLOSE = {"atol": 3e-5, "rtol": 0}
cases = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


def ids_of(n, seed=0):
    return torch.randint(5, 300, (n,), generator=torch.Generator().manual_seed(seed))


@cases
def test_logits_equal_the_definition_and_the_saved_folder_holds_the_same_tensors(layout, tmp_path):
    tensors, ids = layout.tensors(), ids_of(40)
    expected = layout.logits(tensors, ids)
    model = load_model(layout.write(tmp_path / "theirs"))
    torch.testing.assert_close(model.logits(ids, prefix=layout.prefix), expected, **CLOSE)

    folder = save_model(model, tmp_path / "ours")
    saved = load_file(folder / "model.safetensors")
    assert saved.keys() == tensors.keys()
    torch.testing.assert_close(layout.logits(saved, ids), expected, **CLOSE)
    written = json.loads((folder / "config.json").read_text())
    for key, value in layout.config.items():
        if key not in ("architectures", "z_loss_weight", "_name_or_path"):
            assert written.get(key) == value, key
    assert torch.equal(
        load_model(folder).logits(ids, prefix=layout.prefix),
        model.logits(ids, prefix=layout.prefix),
    )


@cases
def test_it_is_packed_cached_quantized_and_adapted_like_any_other(layout, tmp_path, tiny_tokenizer):
    folder = layout.write(tmp_path / "m")
    model, parts = load_model(folder), [ids_of(30), ids_of(21, seed=1)]
    alone = [model.logits(ids, prefix=layout.prefix) for ids in parts]

    lengths, prefixes = (30, 21), (layout.prefix,) * 2
    context = ForwardContext.packed(lengths, prefix_lengths=prefixes if layout.prefix else None)
    if layout.prefix:
        rows = block_position_rows(context.positions, lengths, prefixes)
        context = ForwardContext.packed(lengths, prefix_lengths=prefixes, position_rows=rows)
    packed = model.head(model(torch.cat(parts), context)).split(lengths)
    for ours, expected in zip(packed, alone, strict=True):
        torch.testing.assert_close(ours, expected, **CLOSE)

    prompt = ids_of(12)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    request = Request(prompt_ids=tuple(prompt.tolist()), params=params)
    events = list(Engine(model, tiny_tokenizer).run([request]))
    text = torch.tensor([*prompt.tolist(), *(event.token_id for event in events)])
    prefix = 11 if layout.prefix else 0
    scores = model.logits(text, prefix=prefix).log_softmax(-1)
    for row, event in enumerate(events, 11):
        assert event.token_id == scores[row].argmax()
        assert event.logprob == pytest.approx(scores[row].max().item(), abs=3e-5)

    quantized = load_model(folder, quantize="int4")
    rounded = load_model(folder)
    weights = dict(quantized.weight_modules())
    for name, holder in rounded.weight_modules():
        holder.weight.copy_(weights[name].storage.dense())
    assert "int4" in quantized.packed_formats()
    ours = quantized.logits(parts[0], prefix=layout.prefix)
    expected = rounded.logits(parts[0], prefix=layout.prefix)
    # the kernels round activations, too
    assert (ours - expected).norm() < 0.1 * expected.norm()

    attach(model, LoRAConfig(rank=2))
    for _, adapter in adapter_of(model).linears.values():
        torch.nn.init.normal_(adapter.lora_B, std=0.1)
    adapted = model.logits(parts[0], prefix=layout.prefix)
    assert not torch.allclose(adapted, alone[0], atol=1e-2)
    save_adapter(model, tmp_path / "a", module_name=hf_module_name(model), base=str(folder))
    again = add_adapter(load_model(folder), tmp_path / "a", base=str(folder))
    torch.testing.assert_close(again.logits(parts[0], prefix=layout.prefix), adapted, **CLOSE)
    exported = load_model(save_model(merge(model), tmp_path / "merged"))
    ours = exported.logits(parts[0], prefix=layout.prefix)
    torch.testing.assert_close(ours, adapted, atol=1e-4, rtol=0)


IN_GGUF = {
    "baichuan 7B": Baichuan(layers=32),
    "baichuan 13B": Baichuan(layers=40, alibi=True),
    "baichuan2 7B": Baichuan(layers=32, unit_head=True),
    "chatglm2": LAYOUTS["chatglm2"],
    "chatglm2 32k": LAYOUTS["chatglm2 32k"],
}
"""Layouts that llama.cpp reads; it goes by the number of layers of a Baichuan model."""


@pytest.mark.parametrize("name", IN_GGUF)
def test_a_gguf_file_holds_the_same_model(name, tmp_path, tiny_tokenizer):
    layout, ids = IN_GGUF[name], ids_of(40)
    model = load_model(layout.write(tmp_path / "m"))
    save_gguf(model, tmp_path / "m.gguf", type="f32", tokenizer=tiny_tokenizer)
    again = load_model(tmp_path / "m.gguf")
    torch.testing.assert_close(again.logits(ids), model.logits(ids), **CLOSE)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (Baichuan(alibi=True), "ALiBi to a Baichuan model of 40 layers only.*has 2"),
        (Baichuan(), "RoPE to a Baichuan model of 32 layers only.*has 2"),
    ],
    ids=["alibi", "rope"],
)
def test_gguf_needs_the_number_of_layers_that_llama_cpp_goes_by(
    layout, words, tmp_path, tiny_tokenizer
):
    model = load_model(layout.write(tmp_path / "m"))
    with pytest.raises(CheckpointError, match=words):
        save_gguf(model, tmp_path / "m.gguf", type="f32", tokenizer=tiny_tokenizer)
    assert not (tmp_path / "m.gguf").exists()


def test_a_model_of_transformers_in_the_layout_of_chatglm2(tmp_path):
    """GLM-4 of `transformers` is ChatGLM2 with other names."""
    values = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 0,
        "attention_bias": True,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model("glm", **values, attn_implementation="eager")
    reference = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    state, layout = reference.state_dict(), ChatGLM2()
    found = {
        "transformer.embedding.word_embeddings.weight": state["model.embed_tokens.weight"],
        "transformer.encoder.final_layernorm.weight": state["model.norm.weight"],
        "transformer.output_layer.weight": state["lm_head.weight"],
    }
    renamed = {
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "post_attention_layernorm",
        "self_attn.o_proj": "self_attention.dense",
        "mlp.gate_up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    }
    for i in range(2):
        ours, theirs = f"transformer.encoder.layers.{i}.", f"model.layers.{i}."
        for a, b in renamed.items():
            found[f"{ours}{b}.weight"] = state[f"{theirs}{a}.weight"]
        for kind in ("weight", "bias"):
            parts = [state[f"{theirs}self_attn.{p}_proj.{kind}"] for p in "qkv"]
            found[f"{ours}self_attention.query_key_value.{kind}"] = torch.cat(parts)
    tensors = {name: tensor.clone() for name, tensor in found.items()}
    model = load_model(write_folder(tmp_path / "m", layout.config, tensors))
    ids = ids_of(40)
    torch.testing.assert_close(model.logits(ids), reference(ids[None]).logits[0], **CLOSE)


def of_internlm2(state):
    """Renames a Llama with 4 query and 2 key-value heads of 16 dims to InternLM2."""
    names = {
        "model.embed_tokens": "model.tok_embeddings",
        "lm_head": "output",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    found = renamed_by(
        names, {k: v for k, v in state.items() if "self_attn.o" in k or "_attn" not in k}
    )
    for i in range(2):
        parts = [
            state[f"model.layers.{i}.self_attn.{p}_proj.weight"].view(-1, 16, 64) for p in "qkv"
        ]
        groups = [
            torch.cat([parts[0][2 * g : 2 * g + 2], parts[1][g : g + 1], parts[2][g : g + 1]])
            for g in (0, 1)
        ]
        found[f"model.layers.{i}.attention.wqkv.weight"] = torch.cat(groups).reshape(-1, 64)
    return found


def of_yi(state):
    return renamed_by({"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}, state)


def renamed_by(names, state):
    found = {}
    for name, tensor in state.items():
        for a, b in names.items():
            name = name.replace(a, b)
        found[name] = tensor.clone()
    return found


@pytest.mark.parametrize(("kind", "layout"), [("internlm2", of_internlm2), ("Yi", of_yi)])
def test_a_llama_under_other_names(tmp_path, kind, layout, tiny_tokenizer):
    values = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "max_position_embeddings": 128,
    }
    torch.manual_seed(0)
    theirs = AutoConfig.for_model("llama", **values, attn_implementation="eager")
    reference = AutoModelForCausalLM.from_config(theirs).eval().requires_grad_(False)
    tensors, ids = layout(reference.state_dict()), ids_of(40)
    folder = write_folder(tmp_path / "m", values | {"model_type": kind}, tensors)
    model = load_model(folder)
    torch.testing.assert_close(model.logits(ids), reference(ids[None]).logits[0], **CLOSE)
    saved = load_file(save_model(model, tmp_path / "out") / "model.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensors[name]) for name in tensors)
    save_gguf(model, tmp_path / "m.gguf", type="f32", tokenizer=tiny_tokenizer)
    again = load_model(tmp_path / "m.gguf")
    torch.testing.assert_close(again.logits(ids), model.logits(ids), **CLOSE)


def test_phi3_from_gguf(tmp_path):
    reference = tiny_hf("phi3", {"pad_token_id": 0})
    reference.save_pretrained(tmp_path / "hf")
    model, ids = load_model(tmp_path / "hf"), torch.randint(0, 211, (40,))
    path = tmp_path / "m.gguf"
    write(path, reference, "phi3")
    torch.testing.assert_close(load_model(path).logits(ids), model.logits(ids), **CLOSE)


def test_an_ambiguous_rope_ratio_is_refused(tmp_path):
    layout = ChatGLM2(ratio=16)
    del layout.config["_name_or_path"]
    with pytest.raises(CheckpointError, match=r"rope_ratio=16.*set 'rope_ratio_scales'"):
        load_model(layout.write(tmp_path / "m"))


@pytest.mark.parametrize("name", ["baichuan 7B", "baichuan2 7B", "chatglm2", "chatglm2 32k"])
def test_a_model_with_rope_runs_in_the_compiled_step(name, tmp_path):
    model = load_model(LAYOUTS[name].write(tmp_path / "m"))
    assert CompiledStep.unsupported_reason(model) is None


@cases
def test_missing_and_unexpected_tensors_are_listed(layout, tmp_path):
    tensors = layout.tensors()
    gone = min(name for name in tensors if "layers.1" in name)
    tensors["transformer.surprise"] = tensors.pop(gone)
    folder = write_folder(tmp_path / "m", layout.config, tensors)
    words = r"1 missing: .*; 1 unexpected: transformer\.surprise"
    with pytest.raises(CheckpointError, match=words):
        load_model(folder)
