"""Keys of every family's `config.json`: missing keys get their defaults, and none is ignored."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.configuration_utils import PreTrainedConfig

from easyllm.core.errors import CheckpointError
from easyllm.models import ContextConfig, load_model, save_model
from easyllm.models.families import FAMILIES
from easyllm.models.hf_config import read_config, write_config
from tiny_hf import BASE, EXPERTS, YARN, tiny_hf

OURS_ALONE = {"easyllm", "baichuan", "chatglm", "chatglm2", "glm_blocks", "internlm2", "yi"}
"""Families that `transformers` does not have."""
TYPES = sorted(family.model_types[0] for name, family in FAMILIES.items() if name not in OURS_ALONE)
SIZES = {
    "vocab_size": 211,
    "hidden_size": 256,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
}
GPT2_SIZES = {"vocab_size": 211, "n_embd": 64, "n_layer": 2, "n_head": 4}
T5_SIZES = {"vocab_size": 211, "d_model": 64, "d_ff": 96, "num_layers": 2, "num_heads": 4}


def sizes_of(model_type):
    """Returns the keys that a `config.json` must contain: the sizes of its tensors."""
    more = {"num_experts_per_tok": 4} if model_type == "deepseek_v2" else {}  # it has no default
    own = {"gpt2": GPT2_SIZES, "t5": T5_SIZES}
    return {"model_type": model_type} | own.get(model_type, SIZES | more)


def written_by_hf(values):
    return json.loads(AutoConfig.for_model(**values).to_json_string(use_diff=False))


def told(config):
    """Returns a configuration in a comparable form, with unchanged numbers."""
    return config.model_dump()


@pytest.mark.parametrize("model_type", TYPES)
def test_missing_keys_get_the_defaults_of_transformers(model_type):
    values = sizes_of(model_type)
    assert told(read_config(values)) == told(read_config(written_by_hf(values)))


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "qwen2_moe", "qwen3_moe"])
def test_the_default_windows_of_qwen_equal_transformers(model_type):
    values = sizes_of(model_type) | {"use_sliding_window": True, "max_window_layers": 2}
    ours, theirs = read_config(values), read_config(written_by_hf(values))
    windows = [layer.mixer.window for layer in ours.layers]
    assert 4096 in windows
    assert told(ours) == told(theirs)


def test_defaults_omitted_by_published_files_are_applied():
    mistral = read_config(sizes_of("mistral"))
    assert {layer.mixer.window for layer in mistral.layers} == {4096}
    assert mistral.layers[0].mixer.num_kv_heads == 8
    assert (
        read_config(sizes_of("mistral") | {"sliding_window": None}).layers[0].mixer.window is None
    )
    assert read_config(sizes_of("mixtral")).layers[0].mixer.position.theta == 1e6
    assert read_config(sizes_of("glm4")).layers[0].mixer.qkv_bias
    assert read_config(sizes_of("gemma2")).layers[0].mixer.softcap == 50.0
    assert read_config(sizes_of("llama")).eos_token_ids == (2,)
    assert read_config(sizes_of("llama") | {"eos_token_id": None}).eos_token_ids == ()


NEUTRAL = {
    "attention_dropout": "in training, where we drop nothing",
    "attn_pdrop": "in training",
    "embd_pdrop": "in training",
    "resid_pdrop": "in training",
    "initializer_range": "of fresh weights",
    "use_cache": "how it is computed",
    "reorder_and_upcast_attn": "how it is computed",
    "output_router_logits": "what else is given back",
    "pretraining_tp": "how it was trained",
    "summary_activation": "a head that is not read",
    "summary_first_dropout": "a head that is not read",
    "summary_proj_to_labels": "a head that is not read",
    "summary_type": "a head that is not read",
    "summary_use_proj": "a head that is not read",
    "max_window_layers": "without a window",
    "original_max_position_embeddings": "without a scaling that uses it",
    "_sliding_window_pattern": "next to layer_types",
    "sliding_window": "without a window",
    "use_sliding_window": "without a window",
}
NEUTRAL_FOR_DEEPSEEK = {
    "head_dim": "a copy of qk_rope_head_dim",
    "num_key_value_heads": "latent attention has none",
    "num_mtp_layers": "tokens beyond the next, which are not predicted",
    "num_nextn_predict_layers": "the same in published files",
    "qk_head_dim": "the sum of two others",
    "intermediate_size": "without a dense layer",
    "n_group": "without groups",
    "topk_group": "without groups",
}
NEUTRAL_FOR_T5 = {
    "dropout_rate": "in training",
    "classifier_dropout": "in training",
    "initializer_factor": "of fresh weights",
    "dense_act_fn": "a part of feed_forward_proj",
    "is_gated_act": "a part of feed_forward_proj",
    "is_decoder": "a stack of the two",
}
OTHER_VALUES = {
    "feed_forward_proj": "gated-gelu",
    "hidden_act": "relu",
    "hidden_activation": "gelu",
    "activation_function": "relu",
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
    "eos_token_id": [7, 9],
    "mlp_only_layers": [1],
    "decoder_sparse_step": 2,
    "head_dim": 32,
    "summary_type": "last",
    "summary_activation": "tanh",
    "use_bidirectional_attention": True,
    "vocab_size": 300,
}


def another(key, value):
    """Returns a value that differs from the default."""
    if key in OTHER_VALUES:
        return OTHER_VALUES[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 or 3
    return 3


@pytest.mark.parametrize("model_type", TYPES)
def test_no_key_of_transformers_is_ignored(model_type):
    """Each key changes the configuration, is refused by name, or does not affect the logits."""
    whole = written_by_hf(sizes_of(model_type))
    before = told(read_config(whole))
    shared = PreTrainedConfig().to_dict().keys() - {"tie_word_embeddings"}
    ignored, refused = [], []
    for key in sorted(whole.keys() - shared):
        changed = whole | {key: another(key, whole[key])}
        if key == "num_hidden_layers":
            changed.pop("layer_types", None)
        if key == "layer_types":
            changed |= {"sliding_window": 7, "use_sliding_window": True}
        try:
            if told(read_config(changed)) == before:
                ignored.append(key)
        except ValueError as error:
            refused.append((key, str(error)))
    allowed = NEUTRAL.keys() | ({"intermediate_size"} if "moe" in model_type else set())
    allowed |= NEUTRAL_FOR_DEEPSEEK.keys() if model_type.startswith("deepseek") else set()
    allowed |= NEUTRAL_FOR_T5.keys() if model_type == "t5" else set()
    assert set(ignored) <= allowed
    unnamed = [
        (key, reason) for key, reason in refused if key not in reason and "num_" not in reason
    ]
    assert not unnamed


@pytest.mark.parametrize(
    ("model_type", "changes", "words"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"rope_scaling": {"rope_type": "other"}}, "'other'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 4}, "'chunked_attention'"),
        ("qwen2", {"layer_types": ["full_attention"] * 3}, "3 layer_types for 4 layers"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation='gelu'"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx=True"),
    ],
)
def test_an_unsupported_option_is_refused_by_name(model_type, changes, words):
    with pytest.raises(CheckpointError, match=words):
        read_config(sizes_of(model_type) | changes)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"pretraining_tp": 2}),
        ("llama", {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}}),
        ("llama", {"rope_scaling": YARN | {"mscale": 0.7}}),
        ("llama", {"rope_scaling": YARN | {"factor": None}}),
        ("mistral", {"sliding_window": "left out"}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}),
        (
            "qwen2_moe",
            EXPERTS
            | {
                "shared_expert_intermediate_size": 56,
                "use_sliding_window": True,
                "sliding_window": 7,
                "max_window_layers": 2,
            },
        ),
        ("qwen3_moe", EXPERTS | {"head_dim": 16, "use_sliding_window": True, "sliding_window": 7}),
        ("gemma", {"head_dim": 16, "initializer_range": 0.1, "hidden_act": "gelu"}),
        ("glm", {"head_dim": "left out", "attention_bias": "left out", "num_key_value_heads": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_omitted_and_neutral_keys_give_the_same_logits(tmp_path, model_type, changes):
    left_out = {key for key, value in changes.items() if value == "left out"}
    given = {key: value for key, value in changes.items() if key not in left_out}
    reference = tiny_hf(model_type, given)
    reference.save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    values = json.loads(path.read_text("utf-8"))
    written = {key: value for key, value in values.items() if key not in left_out | {"layer_types"}}
    if model_type == "qwen2":  # transformers 5 writes the list, version 4 the rule
        assert "layer_types" in values
    path.write_text(
        json.dumps(written | {k: v for k, v in given.items() if "window" in k}), "utf-8"
    )
    ids = torch.randint(0, 211, (60,))
    model = load_model(tmp_path / "hf")
    expected = reference(ids[None]).logits[0]
    torch.testing.assert_close(model.logits(ids), expected, atol=3e-5, rtol=0)
    save_model(model, tmp_path / "ours")
    assert torch.equal(load_model(tmp_path / "ours").logits(ids), model.logits(ids))


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16}


def test_dynamic_scaling_is_relative_to_the_models_own_length(tmp_path):
    """As in transformers, which does not read `original_max_position_embeddings` here."""
    reference = tiny_hf("llama", {"rope_scaling": DYNAMIC, "max_position_embeddings": 32})
    reference.save_pretrained(tmp_path / "hf")
    ids = torch.randint(0, 211, (60,))
    model = load_model(tmp_path / "hf")
    torch.testing.assert_close(model.logits(ids), reference(ids[None]).logits[0], atol=3e-5, rtol=0)
    assert model.config.max_seq_len == 64


@pytest.mark.parametrize("method", ["pi", "ntk", "dynamic", "yarn"])
def test_an_extended_context_gives_the_same_model_in_transformers(tmp_path, method):
    tiny_hf("llama", {"max_position_embeddings": 32}).save_pretrained(tmp_path / "hf")
    context = ContextConfig(method=method, factor=3)
    model = load_model(tmp_path / "hf", context=context)
    assert model.config.max_seq_len == 96
    save_model(model, tmp_path / "ours")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    ids = torch.randint(0, 211, (80,))
    torch.testing.assert_close(model.logits(ids), reference(ids[None]).logits[0], atol=3e-5, rtol=0)
    assert load_model(tmp_path / "ours").config == model.config


def test_windows_that_a_family_cannot_represent_are_refused():
    values = sizes_of("qwen3_moe") | {"use_sliding_window": True}
    config = read_config(values)
    first = config.layers[0]
    mixed = first.model_copy(update={"mixer": first.mixer.model_copy(update={"window": None})})
    with pytest.raises(CheckpointError, match="cannot represent"):
        write_config(config.changed(layers=(mixed, *config.layers[1:])))


def test_base_of_the_families_is_complete():
    assert set(SIZES) < set(BASE)
