"""Merging KV heads by mean pooling (MHA to GQA or MQA)."""

import subprocess
import sys

import pytest
import torch

from easyllm.adapters import LoRAConfig, attach, merge
from easyllm.core.errors import CheckpointError, ConfigError
from easyllm.models import load_model, pool_kv_heads, save_model
from easyllm.models.resize import resize_embeddings
from easyllm.nn import Decoder
from easyllm.nn.config import LinearAttentionConfig
from easyllm.quant import quantize_weights
from tiny_models import build_tiny


def with_equal_heads(model, groups):
    """Returns the model with the KV heads of each group set to the group's first head."""
    dim = model.config.layers[0].mixer.head_dim
    for layer in model.layers:
        for projection in (layer.mixer.k_proj, layer.mixer.v_proj):
            for tensor in (projection.weight, projection.bias):
                heads = tensor.data.view(groups, -1, dim, *tensor.shape[1:])
                heads[:] = heads[:, :1].clone()
    return model


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_pooling_equal_heads_gives_the_same_model(groups):
    changes = {"num_key_value_heads": 4, "attention_bias": True}
    model = with_equal_heads(build_tiny(seed=2, **changes), groups)
    ids = torch.arange(3, 60)
    before = model.logits(ids)
    pooled = pool_kv_heads(model, groups)
    assert pooled.config.layers[0].mixer.num_kv_heads == groups
    torch.testing.assert_close(pooled.logits(ids), before, atol=1e-5, rtol=0)


def test_a_pooled_head_is_the_mean_of_its_group():
    model = build_tiny(num_key_value_heads=4)
    old = model.layers[1].mixer.v_proj.weight.clone().view(4, 16, -1)
    pool_kv_heads(model, 2)
    new = model.layers[1].mixer.v_proj.weight.view(2, 16, -1)
    torch.testing.assert_close(new[0], (old[0] + old[1]) / 2)
    torch.testing.assert_close(new[1], (old[2] + old[3]) / 2)


def test_a_pooled_model_is_saved_and_loaded(tmp_path):
    model = pool_kv_heads(build_tiny(num_key_value_heads=4), 1)
    expected = model.logits(torch.arange(3, 40))
    again = load_model(save_model(model, tmp_path / "m"))
    assert torch.equal(again.logits(torch.arange(3, 40)), expected)


def test_a_number_that_does_not_divide_the_heads_is_refused_with_a_list_of_divisors():
    with pytest.raises(ConfigError, match="4 key-value heads cannot be merged into 3; use 1 or 2"):
        pool_kv_heads(build_tiny(num_key_value_heads=4), 3)


def test_linear_attention_is_refused():
    config = build_tiny().config
    linear = LinearAttentionConfig(num_heads=2, head_dim=16)
    layers = (config.layers[0].model_copy(update={"mixer": linear}),)
    with pytest.raises(ConfigError, match="only softmax attention can be converted"):
        pool_kv_heads(Decoder(config.changed(layers=layers)), 1)


def test_parts_that_a_family_cannot_represent_are_refused_or_saved_in_our_own_format(tmp_path):
    config = build_tiny().config
    linear = LinearAttentionConfig(num_heads=2, head_dim=16)
    layers = (config.layers[0].model_copy(update={"mixer": linear}), config.layers[1])
    model = Decoder(config.changed(layers=layers))
    model.reset_parameters(generator=torch.Generator().manual_seed(0))
    with pytest.raises(CheckpointError, match="'llama' cannot represent this model"):
        save_model(model, tmp_path / "no")
    assert not (tmp_path / "no").exists()
    model.config = model.config.changed(family="easyllm", eos_token_ids=(2, 5))
    again = load_model(save_model(model, tmp_path / "yes"))
    assert again.config == model.config
    ids = torch.arange(3, 40)
    assert torch.equal(again.logits(ids), model.logits(ids))


def test_a_norm_placement_of_another_family_is_named(tmp_path):
    config = build_tiny().config
    layers = tuple(layer.model_copy(update={"norm_placement": "post"}) for layer in config.layers)
    model = Decoder(config.changed(layers=layers))
    with pytest.raises(CheckpointError, match=r"layers\.0\.norm_placement is 'pre' there"):
        save_model(model, tmp_path / "no")


ALIEN_PARTS = """
from easyllm.core.errors import CheckpointError
from easyllm.models.families import FAMILIES
from easyllm.models.hf_config import read_config, write_config
from easyllm.models.hf_names import keymap_of
from easyllm.nn.config import LinearAttentionConfig, MLPConfig, MoEConfig, GLUConfig
from easyllm.nn.position_config import Alibi, Rope

assert False, "assertions are on"
sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, \
"num_attention_heads": 32,
         "vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32}
glu = GLUConfig(intermediate_size=8)
told = 0
for name in sorted(set(FAMILIES) - {"easyllm"}):
    if name.startswith(("chatglm", "deepseek", "glm_blocks", "t5")):
        continue  # their files have other keys
    kind = {"gemma3": "gemma3_text", "yi": "Yi"}.get(name, name)
    config = read_config({"model_type": kind, **sizes})
    first = config.layers[0]
    aliens = [
        {"mixer": LinearAttentionConfig(num_heads=2, head_dim=16)},
        {"mixer": first.mixer.model_copy(update={"position": Alibi()})},
        {"feed_forward": MLPConfig(intermediate_size=8, activation="relu")},
        {"feed_forward": MoEConfig(num_experts=2, experts_per_token=1, expert=glu)},
    ]
    for alien in aliens:
        layer = first.model_copy(update=alien)
        changed = config.changed(layers=(layer, layer))
        try:
            write_config(changed)
        except CheckpointError as error:
            assert "\\n" not in str(error)
            if f"{name!r} cannot represent this model" not in str(error):
                raise SystemExit(f"{name}: {error}")
            told += 1
            continue
        if name == "baichuan" and alien.get("mixer") and alien["mixer"].kind == "attention":
            continue  # the 13B model has ALiBi
        if not ("moe" in name or name == "mixtral") or "feed_forward" not in alien:
            raise SystemExit(f"{name} says {alien}")
try:
    keymap_of(config).theirs("layers.0.never")
except CheckpointError:
    told += 1
print(told)
"""


def test_what_a_family_cannot_represent_is_refused_without_assertions_too():
    done = subprocess.run([sys.executable, "-O", "-c", ALIEN_PARTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 45


def test_a_family_that_is_not_registered_is_named(tmp_path):
    model = build_tiny()
    model.config = model.config.changed(family="lama")
    with pytest.raises(CheckpointError, match=r"family 'lama' is not known \(did you mean 'llama'"):
        save_model(model, tmp_path / "no")


CHANGES = {
    "merging key-value heads": lambda model: pool_kv_heads(model, 1),
    "extending the vocabulary": lambda model: resize_embeddings(model, {320: (5, 6)}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_quantized_model_is_refused_and_left_unchanged(change):
    model = build_tiny()
    quantize_weights(model, "int8")
    ids = torch.arange(3, 20)
    before, config = model.logits(ids), model.config
    with pytest.raises(ConfigError, match=f"{change} needs full weights, .* \\(int8\\)"):
        CHANGES[change](model)
    assert model.config == config
    assert torch.equal(model.logits(ids), before)


@pytest.mark.parametrize("change", CHANGES)
def test_an_adapted_model_is_refused_until_it_is_merged(change):
    model = build_tiny()
    attach(model, LoRAConfig(rank=2))
    with pytest.raises(ConfigError, match=f"{change} needs a model without an adapter"):
        CHANGES[change](model)
    merge(model)
    logits = CHANGES[change](model).logits(torch.arange(3, 20))
    assert logits.shape[-1] == (384 if "vocabulary" in change else 320)
