"""Fresh models: requested sizes, reproducible by seed, with an initial loss at chance level."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from easyllm.batches.packing import pack
from easyllm.core.errors import ConfigError
from easyllm.examples.sample import Sample
from easyllm.models import load_model, save_model
from easyllm.models.families import FAMILIES
from easyllm.models.hf_config import write_config
from easyllm.models.scratch import ScratchConfig, build_scratch, scratch_model_config
from easyllm.nn.config import MLPConfig
from easyllm.nn.position_config import Alibi
from easyllm.ops.cross_entropy import linear_cross_entropy
from easyllm.pipeline.recipe import load_train_recipe
from easyllm.plan.parameters import count_parameters
from easyllm.tokenizer.train import train_tokenizer
from easyllm.tokenizer.train_config import TokenizerConfig
from easyllm.train import train
from easyllm.train.metrics import read_metrics
from tiny_models import tiny_config

ROOT = Path(__file__).parents[3]

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
def test_the_initial_loss_is_at_chance_level(tiny_tokenizer, values):
    config = config_of(tiny_tokenizer, **values)
    model = build_scratch(config, seed=0)
    batch = random_batch(config.vocab_size)
    hidden = model(batch.token_ids, batch.context())
    loss = linear_cross_entropy(hidden, model.head_weight, batch.labels)
    assert float(loss.sum) / loss.num_tokens == pytest.approx(math.log(config.vocab_size), abs=0.06)


def test_the_depth_preset_sets_depth_width_and_heads(tiny_tokenizer):
    config = config_of(tiny_tokenizer, depth=6, max_seq_len=512)
    (layer,) = set(config.layers)
    assert (config.num_layers, config.hidden_size, layer.mixer.num_heads) == (6, 384, 6)
    assert (layer.mixer.head_dim, layer.feed_forward.intermediate_size) == (64, 1024)
    assert config.max_seq_len == 512
    assert config.tie_embeddings
    assert config_of(tiny_tokenizer, depth=1).hidden_size == 64


def test_a_named_size_can_be_changed(tiny_tokenizer):
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
def test_a_fresh_model_of_a_family_has_its_kv_heads_and_ignores_no_value(tiny_tokenizer, family):
    values = {"model_type": family, "hidden_size": 64, "intermediate_size": 96}
    values |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    assert config_of(tiny_tokenizer, config=values).layers[0].mixer.num_kv_heads == 4
    published = {"pretraining_tp": 1, "use_cache": True, "tie_word_embeddings": True}
    assert config_of(tiny_tokenizer, config=values | published).tie_embeddings
    with pytest.raises(ConfigError, match="'rope_tetha' is not a value of a model"):
        config_of(tiny_tokenizer, config=values | {"rope_tetha": 1e6})


def test_arbitrary_parts_can_be_changed(tiny_tokenizer):
    config = config_of(
        tiny_tokenizer, config=ANY_PARTS, max_seq_len=32, changes={"final_norm": False}
    )
    assert config.family == "easyllm"
    assert (config.vocab_size, config.max_seq_len) == (tiny_tokenizer.vocab_size, 32)
    assert not config.final_norm
    assert isinstance(config.layers[0].mixer.position, Alibi)
    assert isinstance(config.layers[0].feed_forward, MLPConfig)


def test_the_model_gets_the_tokenizers_ids(tiny_tokenizer):
    config = config_of(tiny_tokenizer, depth=1)
    end_of_turn = tiny_tokenizer.id_of("<|im_end|>")
    end_of_text = tiny_tokenizer.id_of("<|endoftext|>")
    assert config.eos_token_ids == (end_of_turn, end_of_text)
    assert config.bos_token_id == tiny_tokenizer.bos_id
    assert config.pad_token_id == tiny_tokenizer.pad_id
    settings = TokenizerConfig(vocab_size=280, eos=None)
    without = train_tokenizer(["abc"], settings)
    assert config_of(without, depth=1).eos_token_ids == ()


def test_the_same_seed_gives_the_same_weights_without_affecting_other_rng_state(tiny_tokenizer):
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
    "'num_layers' is not a value .* 'llama' \\(did you mean 'num_hidden_layers'\\?\\)": {
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
    "unknown key 'hidden_szie' \\(did you mean 'hidden_size'": {
        "config": ANY_PARTS,
        "changes": {"hidden_szie": 4},
    },
    "must be even and at most head_dim=15": {"depth": 2, "changes": {"head_dim": 15}},
    "the fresh model cannot be built: ": {"depth": 2, "changes": {"num_attention_heads": 0}},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_an_invalid_model_description_is_refused_in_a_sentence(tiny_tokenizer, message):
    with pytest.raises(ConfigError, match=message):
        config_of(tiny_tokenizer, **MISTAKES[message])


def test_a_complete_published_configuration_is_accepted(tiny_tokenizer):
    published = {
        "architectures": ["LlamaForCausalLM"],
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    assert config_of(tiny_tokenizer, config=TINY | published) == config_of(
        tiny_tokenizer, config=TINY
    )


def test_exactly_one_kind_of_size_is_required():
    for values in ({}, {"depth": 2, "size": "smollm2-135m"}):
        with pytest.raises(ValidationError, match="give depth, size or config"):
            ScratchConfig(tokenizer="t", **values)


FEED_FORWARD = {"kind": "mlp", "intermediate_size": 96}
KINDS = (
    "'rope', 'block_rope', 'rerope', 'streaming_rope', 'alibi', 't5_bias', 'shaw', "
    "'transformer_xl', 'deberta', 'none'"
)


def faulty(mixer=None, feed_forward=None, **others):
    """Returns a model whose single layer contains a mistake."""
    heads = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 12}
    layer = {
        "mixer": {**heads, **(mixer or {})},
        "feed_forward": {**FEED_FORWARD, **(feed_forward or {})},
    }
    parts = {"hidden_size": 48, "max_seq_len": 64, "layers": [layer], **others}
    return {"model_type": "easyllm", "parts": parts}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            faulty(layers=[{"mixer": {"num_heads": 4}, "feed_forward": FEED_FORWARD}]),
            "missing key 'layers.0.mixer.kind'; known kinds are 'attention', 'latent_attention', "
            "'linear_attention'",
        ),
        (
            faulty({"position": "alibi"}),
            f"layers.0.mixer.position='alibi': expected a mapping with one of the kinds {KINDS}; "
            "write {kind: alibi}",
        ),
        (
            faulty({"position": {"kind": "alibi", "slope": 3}}),
            "unknown key 'layers.0.mixer.position.slope' (known keys: kind)",
        ),
        (
            faulty({"position": {"kind": "alibbi"}}),
            "layers.0.mixer.position: unknown kind 'alibbi' (did you mean 'alibi'?); "
            f"known kinds are {KINDS}",
        ),
        (
            faulty(feed_forward={"intermediate_sise": 5}),
            "unknown key 'layers.0.feed_forward.intermediate_sise' (did you mean "
            "'intermediate_size'?)",
        ),
        (
            faulty(norm="layer_norm"),
            "norm='layer_norm': expected a mapping with one of the kinds 'rms_norm', "
            "'partial_rms_norm', 'layer_norm'; write {kind: layer_norm} (norm.kind=layer_norm)",
        ),
        (faulty(hiden_size=48), "unknown key 'hiden_size' (did you mean 'hidden_size'?)"),
    ],
)
def test_an_error_in_the_parts_is_one_sentence_with_the_valid_values(tiny_tokenizer, config, said):
    with pytest.raises(ConfigError) as caught:
        config_of(tiny_tokenizer, config=config)
    assert str(caught.value) == f"the parts of the fresh model: {said}"


def test_parts_must_be_a_mapping_without_a_published_family(tiny_tokenizer):
    with pytest.raises(ConfigError, match="is not a mapping"):
        config_of(tiny_tokenizer, config={"model_type": "easyllm", "parts": ["alibi"]})
    with pytest.raises(ConfigError, match="family='llama' does not fit a model from parts"):
        config_of(tiny_tokenizer, config=faulty(family="llama"))


CONTRADICTIONS = [
    ({"vocab_size": 100}, "vocab_size=100 is too small for the"),
    ({"eos_token_id": 7}, "eos_token_id=7 contradicts the fresh model's tokenizer, which has"),
    ({"bos_token_id": 9}, "bos_token_id=9 contradicts"),
    ({"pad_token_id": 9}, "pad_token_id=9 contradicts"),
    ({"eos_token_id": [7, 8]}, "eos_token_id=[7, 8] contradicts"),
]


@pytest.mark.parametrize(("stated", "said"), CONTRADICTIONS)
def test_values_that_contradict_the_tokenizer_are_refused(tiny_tokenizer, stated, said):
    in_parts = {"eos_token_ids" if k == "eos_token_id" else k: v for k, v in stated.items()}
    for values in (
        {"config": TINY | stated},
        {"depth": 1, "changes": stated},
        {"config": faulty(**in_parts)},
        {"config": faulty() | stated},
    ):
        with pytest.raises(ConfigError) as caught:
            config_of(tiny_tokenizer, **values)
        assert str(caught.value).startswith(said)


def test_values_that_agree_with_the_tokenizer_are_accepted(tiny_tokenizer):
    plain = config_of(tiny_tokenizer, config=TINY)
    equal = {
        "vocab_size": plain.vocab_size,
        "bos_token_id": plain.bos_token_id,
        "eos_token_id": list(plain.eos_token_ids),
        "pad_token_id": None,
    }
    assert config_of(tiny_tokenizer, config=TINY | equal) == plain
    one = config_of(tiny_tokenizer, config=TINY | {"eos_token_id": plain.eos_token_ids[1]})
    assert one.eos_token_ids == plain.eos_token_ids[1:]
    larger = plain.vocab_size + 64
    for values in (
        {"config": TINY | {"vocab_size": larger}},
        {"config": faulty(vocab_size=larger)},
    ):
        config = config_of(tiny_tokenizer, **values)
        assert config.vocab_size == larger
        assert len(build_scratch(config, seed=0).embed_tokens.weight) == larger
    again = config_of(tiny_tokenizer, config=faulty())
    written = write_config(again)
    assert config_of(tiny_tokenizer, config=written) == again


def test_the_recipe_in_the_docs_trains_alibi_with_gqa_and_mqa_in_turn(tiny_folder, tmp_path):
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    (recipe,) = [b for b in re.findall(r"```yaml\n(.*?)```", text, re.S) if "kind: alibi" in b]
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe, encoding="utf-8")
    row = {"messages": [{"role": r, "content": "hello there"} for r in ("user", "assistant")]}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 4, encoding="utf-8")
    words = [f"model.tokenizer={tiny_folder}", "epochs=8", "batch_size=4", "device=cpu"]
    config = load_train_recipe(path, [*words, "optimizer.learning_rate=1e-3"])
    output = train(config, tmp_path / "run").output
    model = load_model(output / "model")
    assert [m.config.num_kv_heads for m in (layer.mixer for layer in model.layers)] == [2, 1, 2, 1]
    assert all(isinstance(layer.mixer.position, Alibi) for layer in model.config.layers)
    losses = [row["train/loss_nats"] for row in read_metrics(output) if "train/loss_nats" in row]
    assert losses[-1] < losses[0]
