"""Invariants of objectives on pairs: first step, batching, shared prompts, cached references."""

import json
import math

import pytest
import torch

from easyllm.adapters import LoRAConfig, attach
from easyllm.batches.packing import pack
from easyllm.train import Callback, train
from easyllm.train.loop import accumulate
from easyllm.train.metrics import read_metrics
from easyllm.train.objectives import DPO, DPOConfig, Reference
from easyllm.train.objectives import sequence_logprobs as module
from easyllm.train.objectives.reference import compute_reference
from easyllm.train.objectives.sequence_logprobs import sequence_logprobs
from easyllm.train.reference_cache import REFERENCE_FILE
from preference_rows import PAIRS, random_batch, random_group, write_rows
from tiny_models import build_tiny
from train_twice import Killed, run_config, train_twice

SHAPES = ((7, 5, 9), (1, 3, 1), (20, 6, 2))
FAMILIES = {
    "llama": {},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": False},
    "mistral, window": {"model_type": "mistral", "sliding_window": 6},
    "gemma2": {
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 16,
        "sliding_window": 6,
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 20.0,
    },
}


def tuned_model(**changes):
    """A model with an adapter that differs from its start."""
    model = build_tiny(**changes)
    attach(model, LoRAConfig(rank=4), seed=0)
    generator = torch.Generator().manual_seed(3)
    for parameter in trained(model):
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def dpo(model, beta=0.5, **options):
    objective = DPO(DPOConfig(beta=beta, **options))
    objective.reference = Reference(model, without_adapter=True)
    return objective


def loss_and_gradients(objective, model, *batches):
    model.zero_grad(set_to_none=True)
    loss, metrics = accumulate(model, objective, batches)
    return loss, [p.grad.clone() for p in trained(model)], metrics


def assert_same(found, expected, atol=1e-5):
    assert found[0] == pytest.approx(expected[0], abs=atol)
    assert len(found[1]) == len(expected[1]) > 0
    for a, b in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=10 * atol)


@pytest.mark.parametrize(
    ("loss", "start"), [("sigmoid", math.log(2)), ("robust", math.log(2)), ("hinge", 1), ("ipo", 1)]
)
def test_at_the_first_step_the_margin_is_zero(loss, start):
    model = build_tiny()
    attach(model, LoRAConfig(rank=4), seed=0)  # equal to the base before its first step
    found = dpo(model, loss=loss).loss(model, random_batch(*SHAPES))
    assert found.num_tokens == 3
    assert float(found.sum.detach()) / 3 == pytest.approx(start, abs=5e-6)
    assert found.metrics["reward_margin"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(
    ("family", "loss", "dtype"),
    [(family, "sigmoid", torch.float64) for family in FAMILIES]
    + [("llama", loss, torch.float32) for loss in ("sigmoid", "ipo")],
)
def test_a_prompt_computed_once_gives_the_same_loss_and_gradients(family, loss, dtype, monkeypatch):
    model = tuned_model(**FAMILIES[family]).to(dtype)
    batch = random_batch(*SHAPES, (4, 3, 8, 5, 1))  # the last is a ranking of four
    shared = loss_and_gradients(dpo(model, loss=loss), model, batch)
    rows = []
    embed = model.embed_tokens.register_forward_pre_hook(lambda _, x: rows.append(len(x[0])))
    with monkeypatch.context() as patch:
        patch.setattr(module, "can_share", lambda *_, **__: False)
        separate = loss_and_gradients(dpo(model, loss=loss), model, batch)
    embed.remove()
    assert_same(shared, separate, atol=1e-5 if dtype == torch.float32 else 1e-10)
    assert rows == [len(batch.token_ids)] * 2  # of the policy and the reference, all tokens


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8},
        {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    ],
    ids=["dynamic NTK", "experts"],
)
def test_a_prompt_whose_states_depend_on_the_response_is_not_shared(changes):
    model, rows = build_tiny(**changes), []
    model.embed_tokens.register_forward_pre_hook(lambda _, x: rows.append(len(x[0])))
    batch = random_batch((7, 5, 9))
    sequence_logprobs(model, batch)
    assert rows == [len(batch.token_ids)]


def test_a_shared_prompt_is_computed_once():
    model, rows = tuned_model(), []
    model.embed_tokens.register_forward_pre_hook(lambda _, x: rows.append(len(x[0])))
    batch = random_batch(*SHAPES)
    sequence_logprobs(model, batch)
    assert rows == [len(batch.token_ids) - 7 - 1 - 20]


def test_full_weights_are_trained_through_shared_prompts_too(monkeypatch):
    model = build_tiny().requires_grad_(True)
    objective = dpo(model)
    objective.reference = Reference(build_tiny(seed=1), without_adapter=False)
    batch = random_batch(*SHAPES)
    shared = loss_and_gradients(objective, model, batch)
    with monkeypatch.context() as patch:
        patch.setattr(module, "can_share", lambda *_, **__: False)
        assert_same(shared, loss_and_gradients(objective, model, batch))


def test_packed_pairs_equal_single_ones_and_micro_batches_one_batch():
    model = tuned_model()
    objective = dpo(model)
    groups = [random_group(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    whole = loss_and_gradients(objective, model, pack(groups))
    single = loss_and_gradients(objective, model, *(pack([group]) for group in groups))
    assert_same(single, whole)
    for name, value in whole[2].items():
        assert single[2][name] == pytest.approx(value, abs=1e-4), name


def test_padding_to_a_multiple_changes_nothing():
    model = tuned_model()
    objective, batch = dpo(model), random_batch(*SHAPES)
    padded = batch.padded_to_multiple(64)
    assert len(padded.lengths) == 7
    assert objective.num_terms(padded) == objective.num_terms(batch) == 3
    assert_same(
        loss_and_gradients(objective, model, padded), loss_and_gradients(objective, model, batch)
    )


def test_cached_reference_equals_the_live_one():
    model = tuned_model()
    groups = [random_group(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    live, cached = dpo(model), dpo(model, reference="cached")
    assert (live.needs_reference, cached.needs_reference) == (True, False)
    cached.cached_reference = compute_reference(cached, live.reference, groups, 32)
    assert len(cached.cached_reference) == 6
    assert_same(
        loss_and_gradients(cached, model, pack(groups)),
        loss_and_gradients(live, model, pack(groups)),
    )


def preference_run(tmp_path, base, **changes):
    rows = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    values = {
        "data": {
            "kind": "preferences",
            "train": [str(rows)],
            "eval": [str(rows)],
            "max_seq_len": 64,
        },
        "objective": {"kind": "dpo"},
        "adapter": {"kind": "lora", "rank": 4},
        "batch_size": 3,
        "micro_batch_tokens": 128,
        "max_steps": 8,
        "precision": "fp32",
    }
    config = run_config(tmp_path, base, **values)
    return config.model_validate(config.model_dump(mode="json") | changes)


@pytest.mark.parametrize("reference", ["live", "cached"])
@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_a_killed_run_resumes_bitwise(tmp_path, tiny_folder, reference, adapter):
    changes = {} if adapter == "lora" else {"adapter": None, "optimizer": {"learning_rate": 3e-3}}
    objective = {"kind": "dpo", "reference": reference}
    config = preference_run(tmp_path, tiny_folder, objective=objective, **changes)
    train_twice(config, tmp_path)
    lines = list(read_metrics(tmp_path / "whole"))
    assert lines[0]["train/loss_nats"] == pytest.approx(math.log(2), abs=1e-5)
    assert (tmp_path / "whole" / REFERENCE_FILE).is_file() == (reference == "cached")
    evaluated = [line for line in lines if "eval/reward_margin" in line][-1]
    assert evaluated["eval/reward_margin"] > 0
    assert evaluated["eval/reward_accuracy"] > 0.8


def test_cached_and_live_runs_learn_the_same(tmp_path, tiny_folder):
    figures = {}
    for reference in ("live", "cached"):
        objective = {"kind": "dpo", "reference": reference}
        config = preference_run(tmp_path, tiny_folder, objective=objective)
        figures[reference] = train(config, tmp_path / reference).figures
    for name, value in figures["live"].items():
        if name.startswith("eval_"):
            assert figures["cached"][name] == pytest.approx(value, abs=1e-3), name


def test_a_cache_of_another_model_is_computed_again(tmp_path, tiny_folder):
    config = preference_run(
        tmp_path, tiny_folder, objective={"kind": "dpo", "reference": "cached"}, max_steps=1
    )
    train(config, tmp_path / "whole")
    expected = json.loads((tmp_path / "whole" / REFERENCE_FILE).read_text())
    with pytest.raises(Killed):
        train(config, tmp_path / "run", callbacks=[KillBeforeTheFirstStep()])
    wrong = {"key": "other", "logprobs": dict.fromkeys(expected["logprobs"], -1.0)}
    (tmp_path / "run" / REFERENCE_FILE).write_text(json.dumps(wrong))
    train(config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / REFERENCE_FILE).read_text()) == expected


class KillBeforeTheFirstStep(Callback):
    def on_start(self, run):
        raise Killed
