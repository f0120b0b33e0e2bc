"""Fresh models: as large as asked, the same for the same seed, and at first as good as a guess."""

import math

import pytest
import torch
from pydantic import ValidationError

from conftest import tiny_config
from easyllm.core.errors import ConfigError
from easyllm.data.packing import Sample, pack
from easyllm.models import load_model, save_model
from easyllm.models.families import FAMILIES
from easyllm.models.scratch import ScratchConfig, build_scratch, scratch_model_config
from easyllm.nn.config import Alibi, MLPConfig
from easyllm.ops.cross_entropy import linear_cross_entropy
from easyllm.plan.parameters import count_parameters
from easyllm.tokenizer.train import TokenizerConfig, train_tokenizer

TINY = {k: v for k, v in tiny_config().items() if not k.endswith("token_id")}
ANY_PARTS = {
    "model_type": "easyllm",
    "parts": {
        "hidden_size": 48,
        "max_seq_len": 64,
        "layers": [
            {
                "mixer": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "kind": "attention"}
                | {"position": {"kind": "alibi"}},
                "feed_forward": {"kind": "mlp", "intermediate_size": 96},
            },
            {
                "mixer": {"kind": "linear_attention", "num_heads": 2, "head_dim": 24},
                "feed_forward": {"kind": "glu", "intermediate_size": 64},
            },
        ],
    },
}
GPT2 = {"model_type": "gpt2", "n_embd": 48, "n_head": 4, "n_layer": 2, "n_positions": 64}


def config_of(tokenizer, **values):
    return scratch_model_config(ScratchConfig(tokenizer="unused", **values), tokenizer)


def random_batch(vocab_size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab_size, (4, 65), generator=generator).tolist()
    return pack([Sample.from_mask(row) for row in ids])


@pytest.mark.parametrize(
    "values",
    [{"config": TINY}, {"depth": 4}, {"config": ANY_PARTS}, {"config": GPT2}],
    ids=["tiny", "depth 4", "any parts", "gpt2"],
)
def test_the_first_loss_is_that_of_a_guess(tiny_tokenizer, values):
    config = config_of(tiny_tokenizer, **values)
    model = build_scratch(config, seed=0)
    batch = random_batch(config.vocab_size)
    hidden = model(batch.token_ids, batch.context())
    loss = linear_cross_entropy(hidden, model.head_weight, batch.labels)
    assert float(loss.sum) / loss.num_tokens == pytest.approx(math.log(config.vocab_size), abs=0.06)


def test_the_dial_sets_depth_width_and_heads(tiny_tokenizer):
    config = config_of(tiny_tokenizer, depth=6, max_seq_len=512)
    (layer,) = set(config.layers)
    assert (config.num_layers, config.hidden_size, layer.mixer.num_heads) == (6, 384, 6)
    assert (layer.mixer.head_dim, layer.feed_forward.intermediate_size) == (64, 1024)
    assert config.max_seq_len == 512
    assert config.tie_embeddings
    assert config_of(tiny_tokenizer, depth=1).hidden_size == 64


def test_a_named_size_with_changes(tiny_tokenizer):
    changes = {"num_hidden_layers": 2, "rope_theta": 5000.0}
    config = config_of(tiny_tokenizer, size="smollm2-135m", changes=changes, max_seq_len=128)
    assert (config.num_layers, config.hidden_size, config.max_seq_len) == (2, 576, 128)
    assert config.layers[0].mixer.position.theta == 5000.0
    assert config.vocab_size == tiny_tokenizer.vocab_size


def test_every_named_size_describes_a_model(tiny_tokenizer):
    for family in FAMILIES.values():
        for name in family.sizes:
            config = config_of(tiny_tokenizer, size=name)
            assert config.vocab_size == tiny_tokenizer.vocab_size
            assert count_parameters(config).total > 10**7


@pytest.mark.parametrize("family", ["gemma", "gemma2", "glm4", "qwen2", "qwen3", "mistral"])
def test_a_fresh_model_of_a_family_has_as_many_key_value_heads_and_no_value_is_ignored(
    tiny_tokenizer, family
):
    values = {"model_type": family, "hidden_size": 64, "intermediate_size": 96}
    values |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    assert config_of(tiny_tokenizer, config=values).layers[0].mixer.num_kv_heads == 4
    published = {"pretraining_tp": 1, "use_cache": True, "tie_word_embeddings": True}
    assert config_of(tiny_tokenizer, config=values | published).tie_embeddings
    with pytest.raises(ConfigError, match="'rope_tetha' is no value of a model"):
        config_of(tiny_tokenizer, config=values | {"rope_tetha": 1e6})


def test_any_parts_with_changes(tiny_tokenizer):
    config = config_of(
        tiny_tokenizer, config=ANY_PARTS, max_seq_len=32, changes={"final_norm": False}
    )
    assert config.family == "easyllm"
    assert (config.vocab_size, config.max_seq_len) == (tiny_tokenizer.vocab_size, 32)
    assert not config.final_norm
    assert isinstance(config.layers[0].mixer.position, Alibi)
    assert isinstance(config.layers[0].feed_forward, MLPConfig)


def test_the_tokenizers_ids_are_the_models(tiny_tokenizer):
    config = config_of(tiny_tokenizer, depth=1)
    end_of_turn = tiny_tokenizer.id_of("<|im_end|>")
    end_of_text = tiny_tokenizer.id_of("<|endoftext|>")
    assert config.eos_token_ids == (end_of_turn, end_of_text)
    assert config.bos_token_id == tiny_tokenizer.bos_id
    assert config.pad_token_id == tiny_tokenizer.pad_id
    settings = TokenizerConfig(vocab_size=280, eos=None)
    without = train_tokenizer(["abc"], settings)
    assert config_of(without, depth=1).eos_token_ids == ()


def test_the_same_seed_gives_the_same_weights_and_leaves_other_randomness_alone(tiny_tokenizer):
    config = config_of(tiny_tokenizer, config=TINY)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    models = [build_scratch(config, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(3), expected)
    one, same, other = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["embed_tokens.weight"], other["embed_tokens.weight"])
    half = build_scratch(config, seed=1, dtype=torch.bfloat16)
    assert all(torch.equal(p, one[name].bfloat16()) for name, p in half.named_parameters())


def test_projections_back_into_the_residual_stream_start_smaller(tiny_tokenizer):
    model = build_scratch(config_of(tiny_tokenizer, depth=8), seed=0)
    layer = model.layers[0]
    assert float(layer.mixer.q_proj.weight.std()) == pytest.approx(0.02, rel=0.02)
    for back in (layer.mixer.o_proj, layer.feed_forward.down_proj):
        assert float(back.weight.std()) == pytest.approx(0.02 / 4, rel=0.02)


@pytest.mark.parametrize("values", [{"config": TINY}, {"config": ANY_PARTS}, {"config": GPT2}])
def test_a_fresh_model_is_saved_and_read_back(tiny_tokenizer, tmp_path, values):
    model = build_scratch(config_of(tiny_tokenizer, **values), seed=0)
    save_model(model, tmp_path / "m", tokenizer=tiny_tokenizer)
    again = load_model(tmp_path / "m")
    assert again.config == model.config
    ids = list(range(3, 20))
    assert torch.equal(again.logits(ids), model.logits(ids))


MISTAKES = {
    "a width of 34 is not divisible by 4 heads; set it to 32 or 36, or give head_dim": {
        "config": {k: v for k, v in TINY.items() if k != "head_dim"} | {"hidden_size": 34}
    },
    "a width of 50 is not divisible by 4 heads; set it to 48 or 52": {
        "config": GPT2 | {"n_embd": 50}
    },
    "num_heads=4 is not divisible by num_kv_heads=3; set num_kv_heads to 1, 2 or 4": {
        "config": TINY | {"num_key_value_heads": 3}
    },
    "'num_layers' is no value of a model of type 'llama' \\(did you mean 'num_hidden_layers'\\?\\)": {
        "depth": 2,
        "changes": {"num_layers": 4},
    },
    "model size 'smollm-135m' is unknown \\(did you mean 'smollm2-135m'\\?\\)": {
        "size": "smollm-135m"
    },
    "the model's values have no 'intermediate_size'$": {
        "config": {k: v for k, v in TINY.items() if k != "intermediate_size"}
    },
    "hidden_size: Input should be greater than 0": {"config": TINY | {"hidden_size": -32}},
    "model_type 'lama' is not known \\(did you mean 'llama'": {"config": {"model_type": "lama"}},
    "the model's values set hidden_act='gelu'": {"depth": 2, "changes": {"hidden_act": "gelu"}},
    "hidden_szie: Extra inputs": {"config": ANY_PARTS, "changes": {"hidden_szie": 4}},
    "must be even and at most head_dim=15": {"depth": 2, "changes": {"head_dim": 15}},
    "the fresh model cannot be built: ": {"depth": 2, "changes": {"num_attention_heads": 0}},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_what_describes_no_model_is_refused_in_a_sentence(tiny_tokenizer, message):
    with pytest.raises(ConfigError, match=message):
        config_of(tiny_tokenizer, **MISTAKES[message])


def test_a_published_configuration_may_stand_whole(tiny_tokenizer):
    published = {
        "architectures": ["LlamaForCausalLM"],
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    assert config_of(tiny_tokenizer, config=TINY | published) == config_of(
        tiny_tokenizer, config=TINY
    )


def test_there_is_exactly_one_size():
    for values in ({}, {"depth": 2, "size": "smollm2-135m"}):
        with pytest.raises(ValidationError, match="give depth, size or config"):
            ScratchConfig(tokenizer="t", **values)
