"""Settings of low-rank updates: ranks, scales, biases, and the learning rates of LoRA+."""

import math

import pytest
import torch

from adapter_kinds import BIASES, model_with
from easyllm.adapters import DoRAConfig, LoRAConfig, PiSSAConfig, attach, load_adapter, save_adapter
from easyllm.core.errors import CheckpointError, ConfigError
from easyllm.models import hf_module_name
from easyllm.train.optim import MasterOptimizer
from easyllm.train.optim_config import AdamWConfig
from easyllm.train.parameter_groups import build_groups
from tiny_models import build_tiny

IDS = torch.arange(5, 45)


def test_the_first_matching_pattern_sets_rank_and_alpha():
    config = LoRAConfig(
        rank=4,
        alpha=6,
        rank_pattern={"layers.0.*": 2, "q_proj": 3},
        alpha_pattern={"q_proj": 9},
    )
    ranks = {
        name: (config.rank_of(name), config.scale_of(name))
        for name in ("layers.0.mixer.q_proj", "layers.1.mixer.q_proj", "layers.1.mixer.k_proj")
    }
    assert list(ranks.values()) == [(2, 9 / 2), (3, 9 / 3), (4, 6 / 4)]
    stable = config.model_copy(update={"rslora": True})
    assert stable.scale_of("layers.1.mixer.q_proj") == 9 / math.sqrt(3)


@pytest.mark.parametrize("kind", [LoRAConfig, DoRAConfig, PiSSAConfig])
def test_a_rank_above_that_of_a_matrix_is_refused(kind):
    with pytest.raises(ConfigError, match=r"adapter.rank=33 is more than the rank of q_proj"):
        attach(build_tiny(), kind(rank=33, targets=("q_proj",)))
    attach(build_tiny(), kind(rank=32, targets=("q_proj",)))
    by_pattern = kind(rank=2, targets=("q_proj", "up_proj"), rank_pattern={"up_proj": 40})
    with pytest.raises(ConfigError, match=r"adapter\.rank=40 is more than the rank of up_proj"):
        attach(build_tiny(), by_pattern)


def factors(config, **changes):
    model = build_tiny(**changes)
    found = attach(model, config).rate_factors(model)
    return {name.removeprefix("layers.0.mixer.") for name, f in found.items() if f == 8.0}, found


def test_lora_plus_raises_the_rate_of_the_matrix_that_starts_at_zero():
    config = LoRAConfig(rank=2, rate_ratio=8, targets=("layers.0*q_proj", "embed_tokens"))
    raised, found = factors(config)
    assert raised == {"q_proj.adapter.lora_B", "embed_tokens.adapter.lora_embedding_A"}
    assert len(found) == 2
    assert factors(config.model_copy(update={"rate_ratio": 1.0}))[1] == {}
    raised, _ = factors(DoRAConfig(rank=2, rate_ratio=8, targets=("layers.0*q_proj",)))
    assert raised == {"q_proj.adapter.lora_B"}


def test_lora_plus_leaves_other_parameters_alone():
    """Trained rows that are zero, as of added tokens, are no low-rank matrix."""
    model = build_tiny()
    with torch.no_grad():
        model.embed_tokens.weight[[7, 9]] = 0
    config = LoRAConfig(
        rank=2,
        rate_ratio=8,
        targets=("q_proj",),
        trained_tokens=(7, 9),
        also_trained=("layers.1.mixer.o_proj",),
    )
    found = attach(model, config).rate_factors(model)
    assert {name.rpartition(".")[2] for name in found} == {"lora_B"}


def test_lora_plus_groups_have_the_rate_times_the_ratio():
    model = build_tiny()
    adapters = attach(model, LoRAConfig(rank=2, rate_ratio=8, targets=("q_proj",)))
    groups = build_groups(
        adapters.trained_parameters(model),
        AdamWConfig(learning_rate=1e-3),
        rate_factors=adapters.rate_factors(model),
    )
    rates = {name.rpartition(".")[2]: g.learning_rate for g in groups for name in g.names}
    assert rates == {"lora_A": pytest.approx(1e-3), "lora_B": pytest.approx(8e-3)}


def test_one_step_of_lora_plus_moves_b_by_the_ratio():
    moved = {}
    for ratio in (1.0, 8.0):
        model = build_tiny()
        adapters = attach(model, LoRAConfig(rank=2, rate_ratio=ratio, targets=("q_proj",)))
        trained = adapters.trained_parameters(model)
        before = {n: p.detach().clone() for n, p in trained.items()}
        for parameter in trained.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer = MasterOptimizer(
            trained,
            AdamWConfig(learning_rate=1e-3, weight_decay=0),
            (),
            None,
            rate_factors=adapters.rate_factors(model),
        )
        optimizer.step(1.0)
        moved[ratio] = {n: (before[n] - p).abs().mean().item() for n, p in trained.items()}
    for name, plain in moved[1.0].items():
        factor = 8 if name.endswith("lora_B") else 1
        assert moved[8.0][name] == pytest.approx(factor * plain, rel=1e-3)


# ---- biases


def bias_names(bias, targets=("q_proj",)):
    model, adapters = model_with(LoRAConfig(rank=2, targets=targets, bias=bias))
    named = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    return set(adapters.base_parameters), named


def test_all_biases_or_those_of_adapted_linears_are_trained():
    found, every = bias_names("all")
    assert found == every
    assert len(every) == 2 * 7
    found, _ = bias_names("adapted")
    assert found == {f"layers.{layer}.mixer.q_proj.bias" for layer in (0, 1)}
    found, _ = bias_names("none")
    assert found == set()


@pytest.mark.parametrize(
    ("bias", "words"),
    [("all", "the model has none"), ("adapted", "the adapted linears have none")],
)
def test_biases_that_do_not_exist_are_refused(bias, words):
    with pytest.raises(ConfigError, match=f"adapter.bias={bias} .*{words}"):
        attach(build_tiny(), LoRAConfig(rank=2, bias=bias))


def test_trained_biases_are_restored_when_a_loaded_adapter_is_detached(tmp_path):
    model, _ = model_with("lora, adapted biases")
    where = hf_module_name(model)
    save_adapter(model, tmp_path / "a", module_name=where, base="tiny")
    again = build_tiny(**BIASES)
    adapters = load_adapter(again, tmp_path / "a", module_name=where)
    assert set(adapters.replaced) == {f"layers.{n}.mixer.q_proj.bias" for n in (0, 1)}
    assert adapters.config.bias == "adapted"
    with pytest.raises(ConfigError, match=r"trained with layers.0.mixer.q_proj, layers.1"):
        load_adapter(build_tiny(**BIASES), tmp_path / "a", module_name=where, name="one")


def test_an_unknown_value_of_bias_in_a_file_is_refused(tmp_path):
    import json

    model, _ = model_with("lora, all biases")
    where = hf_module_name(model)
    save_adapter(model, tmp_path / "a", module_name=where, base="tiny")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bias": "some"}))
    with pytest.raises(CheckpointError, match="bias='some', which is not known"):
        load_adapter(build_tiny(**BIASES), tmp_path / "a", module_name=where)
