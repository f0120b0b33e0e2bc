"""Families from GGUF files against `transformers`: tiny random models in llama.cpp's format.

Tensor names come from the `gguf` package's own map, so that a mistake in our names is not repeated
here.
"""

import math

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from easyllm.core.errors import CheckpointError, ConfigError
from easyllm.models import families, load_model, save_model
from easyllm.nn.position_config import FactorScaling, Llama3Scaling
from gguf_writing import tensors_of, write
from tiny_hf import BASE, EXPERTS, LLAMA3, tiny_hf

HF = {key: value for key, value in BASE.items() if key != "vocab_size"}


def llama3_factors(theta=10000.0, width=12, factor=8.0, original=32):
    """Returns the tensor that llama.cpp's converter writes for Llama 3's scaling (its formula)."""
    low, high, factors = 1.0, 4.0, []
    for i in range(0, width, 2):
        wavelength = 2 * math.pi * theta ** (i / width)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 32,
}


LINEAR = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}


SOFTCAPS = {
    "attention.sliding_window": 9,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}


MIXTURE = {"expert_count": 6, "expert_used_count": 2, "expert_feed_forward_length": 40}


CASES = {
    "llama": ("llama", {}, "llama", {}, []),
    "llama, rope factors of Llama 3": (
        "llama",
        {"rope_scaling": LLAMA3},
        "llama",
        {},
        [("rope_freqs.weight", llama3_factors())],
    ),
    "llama linear": (
        "llama",
        LINEAR,
        "llama",
        {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
        [],
    ),
    "llama, the old name of a linear factor": (
        "llama",
        LINEAR,
        "llama",
        {"rope.scale_linear": 2.0},
        [],
    ),
    "llama yarn": ("llama", {"rope_scaling": YARN}, "llama", YARN_KEYS, []),
    "llama yarn, attention factor": (
        "llama",
        {"rope_scaling": YARN | {"attention_factor": 0.7 * (0.1 * math.log(4.0) + 1)}},
        "llama",
        YARN_KEYS | {"rope.scaling.attn_factor": 0.7},
        [],
    ),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}, "llama", {}, []),
    "llama tied": ("llama", {"tie_word_embeddings": True}, "llama", {}, []),
    "mistral": ("mistral", {"sliding_window": 9}, "llama", {"attention.sliding_window": 9}, []),
    "mistral no window": ("mistral", {"sliding_window": None}, "llama", {}, []),
    "qwen2": ("qwen2", {}, "qwen2", {}, []),
    "qwen2 yarn": ("qwen2", {"rope_scaling": YARN}, "qwen2", YARN_KEYS, []),
    "qwen3": ("qwen3", {"head_dim": 16}, "qwen3", {}, []),
    "gemma": ("gemma", {"head_dim": 16, "initializer_range": 0.1}, "gemma", {}, []),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 9,
            "layer_types": ["sliding_attention"] * 3,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            },
        },
        "gemma3",
        {"attention.sliding_window": 9},
        [],
    ),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 9,
            "initializer_range": 0.1,
        },
        "gemma2",
        SOFTCAPS,
        [],
    ),
    "mixtral": (
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        "llama",
        {"expert_count": 4, "expert_used_count": 2},
        [],
    ),
    "qwen2moe": (
        "qwen2_moe",
        EXPERTS | {"shared_expert_intermediate_size": 56},
        "qwen2moe",
        MIXTURE | {"expert_shared_feed_forward_length": 56},
        [],
    ),
    "qwen3moe": (
        "qwen3_moe",
        EXPERTS | {"head_dim": 16, "norm_topk_prob": True},
        "qwen3moe",
        MIXTURE | {"expert_weights_scale": 0.0},
        [],
    ),
    "gpt2": ("gpt2", {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 128}, "gpt2", {}, []),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_logits_equal_transformers(case, tmp_path):
    model_type, changes, arch, keys, extra = case
    reference = tiny_hf(model_type, changes)
    ids = torch.randint(0, 211, (60,))
    expected = reference(ids[None]).logits[0]
    model = load_model(write(tmp_path / "m.gguf", reference, arch, keys, extra))
    torch.testing.assert_close(model.logits(ids), expected, atol=3e-5, rtol=0)

    save_model(model, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    torch.testing.assert_close(again(ids[None]).logits[0], expected, atol=3e-5, rtol=0)


def test_every_architecture_is_tested():
    tried = {arch for _, _, arch, _, _ in CASES.values()}
    known = {name for f in families.FAMILIES.values() if f.gguf for name in f.gguf.architectures}
    # layouts of their authors are compared with definitions in test_authors_layouts, DeepSeek's in
    # test_gguf_written
    assert tried | {"baichuan", "chatglm", "deepseek2", "internlm2", "phi3"} == known


def test_llama_3_factors_become_its_scaling_rule_and_others_stay_factors(tmp_path):
    reference = tiny_hf("llama", {})
    three = [("rope_freqs.weight", llama3_factors())]
    config = load_model(write(tmp_path / "a.gguf", reference, "llama", (), three)).config
    assert config.layers[0].mixer.position.scaling == Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=32
    )

    odd = np.array([1, 2, 3, 5, 7, 11], np.float32)
    model = load_model(
        write(tmp_path / "b.gguf", reference, "llama", (), [("rope_freqs.weight", odd)])
    )
    assert model.config.layers[0].mixer.position.scaling == FactorScaling(factors=tuple(odd))
    with pytest.raises(CheckpointError, match=r"cannot represent.*factors.*'easyllm'"):
        save_model(model, tmp_path / "no")
    assert not (tmp_path / "no").exists()
    model.config = model.config.changed(family="easyllm")
    ids = torch.randint(0, 211, (40,))
    again = load_model(save_model(model, tmp_path / "yes"))
    assert torch.equal(again.logits(ids), model.logits(ids))


def test_factors_divide_the_frequencies(tmp_path):
    """Equal factors for all pairs are linear scaling."""
    reference = tiny_hf("llama", LINEAR)
    twos = [("rope_freqs.weight", np.full(6, 2, np.float32))]
    ids = torch.randint(0, 211, (60,))
    model = load_model(write(tmp_path / "m.gguf", reference, "llama", (), twos))
    torch.testing.assert_close(model.logits(ids), reference(ids[None]).logits[0], atol=3e-5, rtol=0)
    both = {"rope.scaling.factor": 2.0}
    model = load_model(write(tmp_path / "n.gguf", reference, "llama", both, twos))
    assert model.config.layers[0].mixer.position.scaling.factors == (4.0,) * 6


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"expert_count": 8}, "no llama.expert_used_count"),
        ({"expert_used_count": 2}, "llama.expert_used_count=2"),
        (
            {"expert_count": 8, "expert_used_count": 2, "expert_gating_func": 2},
            "llama.expert_gating_func=2",
        ),
        ({"expert_count": 8, "expert_used_count": 2}, "unexpected|missing"),
        ({"logit_scale": 8.0}, "llama.logit_scale=8"),
        ({"residual_scale": 0.22}, "llama.residual_scale=0.2"),
        ({"embedding_scale": 12.0}, "llama.embedding_scale=12"),
        ({"attention.scale": 0.5}, "llama.attention.scale=0.5"),
        ({"attention.clamp_kqv": 8.0}, "llama.attention.clamp_kqv=8"),
        ({"attention.causal": False}, "llama.attention.causal=False"),
        ({"use_parallel_residual": True}, "llama.use_parallel_residual=True"),
        ({"attn_logit_softcapping": 50.0}, "llama.attn_logit_softcapping=50"),
        ({"rope.dimension_count": 6}, r"llama.rope.dimension_count=6.*expected 12"),
        ({"rope.scaling.type": "longrope"}, "llama.rope.scaling.type='longrope'"),
        ({"rope.scaling.attn_factor": 0.5}, "llama.rope.scaling.attn_factor=0.5"),
        (YARN_KEYS | {"rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor=0.5"),
        ({"rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier=0.1"),
        ({"never_heard_of": 3}, "llama.never_heard_of=3"),
    ],
)
def test_an_unsupported_key_is_refused_by_name(tmp_path, keys, words):
    path = write(tmp_path / "m.gguf", tiny_hf("llama", {}), "llama", keys)
    with pytest.raises(CheckpointError, match=words):
        load_model(path)


@pytest.mark.parametrize(
    "keys",
    [
        {"expert_count": 0, "expert_used_count": 0},
        {"logit_scale": 1.0, "residual_scale": 0.0},
        {"attention.causal": True, "use_parallel_residual": False},
        {"attention.scale": 12**-0.5, "rope.dimension_count": 12},
        {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
        {"rope.scaling.factor": 1.0, "rope.scaling.finetuned": True},
        {"tensor_data_layout": "Meta AI original pth", "never_heard_of": 0},
    ],
)
def test_a_key_without_effect_is_accepted(tmp_path, keys):
    reference = tiny_hf("llama", {})
    ids = torch.randint(0, 211, (40,))
    model = load_model(write(tmp_path / "m.gguf", reference, "llama", keys))
    torch.testing.assert_close(model.logits(ids), reference(ids[None]).logits[0], atol=3e-5, rtol=0)


@pytest.mark.parametrize("shape", [(), (9,), (5000, 1, 1)])
def test_stacked_experts_of_another_shape_are_named(tmp_path, shape):
    reference = tiny_hf("llama", {})
    extra = [("blk.0.ffn_up_exps.weight", np.ones(shape, np.float32))]
    with pytest.raises(CheckpointError, match="unexpected"):
        load_model(write(tmp_path / "m.gguf", reference, "llama", (), extra))


@pytest.mark.parametrize(
    "name", ["blk.0.attn_q_norm.weight", "blk.1.attn_sinks.weight", "rope_factors_long.weight"]
)
def test_an_unsupported_tensor_is_refused_by_name(tmp_path, name):
    extra = [(name, np.ones(12, np.float32))]
    path = write(tmp_path / "m.gguf", tiny_hf("llama", {}), "llama", (), extra)
    with pytest.raises(CheckpointError, match=name):
        load_model(path)


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        (np.full(3, 2, np.float32), "contains 3 factors, expected 6"),
        (np.zeros(6, np.float32), "does not describe a valid model"),
        (np.full(6, np.nan, np.float32), "does not describe a valid model"),
    ],
)
def test_invalid_rope_factors_are_refused(tmp_path, factors, words):
    extra = [("rope_freqs.weight", factors)]
    path = write(tmp_path / "m.gguf", tiny_hf("llama", {}), "llama", (), extra)
    with pytest.raises(CheckpointError, match=words):
        load_model(path)


def test_rope_factors_of_a_model_without_rope_are_refused(tmp_path):
    extra = [("rope_freqs.weight", np.full(6, 2, np.float32))]
    path = write(tmp_path / "m.gguf", tiny_hf(*CASES["gpt2"][:2]), "gpt2", (), extra)
    with pytest.raises(CheckpointError, match=r"rope_freqs.weight"):
        load_model(path)


# ---- split files


def write_parts(folder, reference, count=3):
    return [
        write(folder / f"m-{n + 1:05d}-of-{count:05d}.gguf", reference, "llama", part=(n, count))
        for n in range(count)
    ]


@pytest.mark.parametrize("named", [0, 1, 2])
def test_all_parts_are_read_whichever_is_given(tmp_path, named):
    reference = tiny_hf("llama", {})
    parts = write_parts(tmp_path, reference)
    ids = torch.randint(0, 211, (40,))
    model = load_model(parts[named])
    torch.testing.assert_close(model.logits(ids), reference(ids[None]).logits[0], atol=3e-5, rtol=0)


def test_a_missing_part_is_named(tmp_path):
    first, second, third = write_parts(tmp_path, tiny_hf("llama", {}))
    third.unlink()
    for part in (first, second):
        with pytest.raises(CheckpointError, match=r"one of 3 parts.*m-00003-of-00003\.gguf"):
            load_model(part)


def test_a_misnamed_part_or_one_of_another_model_is_named(tmp_path):
    reference = tiny_hf("llama", {})
    first, second, third = write_parts(tmp_path, reference)
    lonely = tmp_path / "lonely.gguf"
    lonely.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=r"one of 3 parts.*NAME-00001-of-00003"):
        load_model(lonely)
    second.write_bytes(third.read_bytes())
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.gguf is not part 2 of 3"):
        load_model(first)
    write(second, reference, "llama")
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.gguf is not part 2 of 3"):
        load_model(first)


# ---- a custom family


def read_windy(metadata):
    heads, hidden = metadata.need("attention.head_count"), metadata.need("embedding_length")
    return {
        "model_type": "windy",
        "hidden_size": hidden,
        "intermediate_size": metadata.need("feed_forward_length"),
        "num_hidden_layers": metadata.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("attention.head_count_kv", heads),
        "head_dim": metadata.get("attention.key_length", hidden // heads),
        "rms_norm_eps": metadata.need("attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.get("rope.freq_base", 10000.0),
        "max_position_embeddings": metadata.need("context_length"),
        "sliding_window": metadata.need("windy.gust"),
    }


def windy_family(**changes):
    """Registers Mistral under other names, with its down projection stored negated."""
    from easyllm.models.families import mistral
    from easyllm.models.families.gguf_layout import LLAMA_NAMES

    values = {
        "name": "windy",
        "model_types": ("windy",),
        "read_config": lambda hf: mistral.read_config(hf).changed(family="windy"),
        "write_config": lambda config: mistral.write_config(config) | {"model_type": "windy"},
        "keymap": mistral.FAMILY.keymap,
        "gguf": families.GGUFLayout(
            architectures=("windy",),
            read_config=read_windy,
            names={k.replace("ffn_down", "ffn_gone"): v for k, v in LLAMA_NAMES.items()},
            transforms={"blk.{i}.ffn_gone": lambda tensor, config: -tensor},
        ),
    }
    return families.Family(**values | changes)


def test_a_registered_family_is_read_from_gguf(tmp_path, families_restored):
    reference = tiny_hf("mistral", {"sliding_window": 9})
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "windy")
    config = reference.config
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(211)
    writer.add_uint32("windy.windy.gust", 9)
    for name, array in tensors_of(reference, "qwen2"):
        array = -array if "ffn_down" in name else array
        writer.add_tensor(name.replace("ffn_down", "ffn_gone"), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="GGUF architecture 'windy' is not known"):
        load_model(tmp_path / "m.gguf")
    families.register_family(windy_family())
    ids = torch.randint(0, 211, (60,))
    model = load_model(tmp_path / "m.gguf")
    assert model.config.family == "windy"
    torch.testing.assert_close(model.logits(ids), reference(ids[None]).logits[0], atol=3e-5, rtol=0)
    again = load_model(save_model(model, tmp_path / "out"))
    assert torch.equal(again.logits(ids), model.logits(ids))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "llama"}, "family 'llama' is already registered"),
        (
            {"model_types": ("windy", "qwen3")},
            "model_type 'qwen3' is already read by the family 'qwen3'",
        ),
        (
            {"gguf": families.FAMILIES["gemma"].gguf},
            "GGUF architecture 'gemma' is already read by the family 'gemma'",
        ),
    ],
)
def test_names_of_another_family_are_refused(families_restored, changes, words):
    with pytest.raises(ConfigError, match=words):
        families.register_family(windy_family(**changes))
    assert "windy" not in families.FAMILIES
