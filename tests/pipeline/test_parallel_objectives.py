"""Objectives whose loss or data depend on the whole step, in two processes and in one."""

import json

import pytest
import torch
from safetensors.torch import load_file

from easyllm.core.errors import ConfigError
from easyllm.train import TrainConfig
from easyllm.train.division import undivided_reason
from easyllm.train.metrics import read_metrics
from easyllm.train.objectives import build_objective
from easyllm.verify.parallel import verify_parallel
from rl_runs import rl_config
from stage_runs import losses, run_stages, stage

ROLLOUT = {"deterministic": True, "epochs": 2, "minibatches": 2}
GRPO = {"rollout": ROLLOUT, "kl": {"coefficient": 0.1}}


def kto_values(folder, model):
    texts = ["hello there", "what is it", "0123456789", "good morning", "dog and fox", "fox"]
    rows = [
        {"prompt": text[:4], "completion": text[4:] or "x", "label": bool(n % 2)}
        for n, text in enumerate(texts)
    ]
    file = folder / "labelled.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": str(model),
        "objective": {"kind": "kto"},
        "data": {"kind": "unpaired_preferences", "train": [str(file)], "max_seq_len": 64},
        "optimizer": {"kind": "adamw", "learning_rate": 1e-3},
        "batch_size": 5,
        "micro_batch_tokens": 64,
        "max_steps": 6,
        "epochs": 50,
        "precision": "fp32",
        "save_every": 0,
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("objectives")
    grpo = rl_config(folder, tiny_folder, GRPO, max_steps=8).model_dump(mode="json")
    kto = kto_values(folder, tiny_folder)
    stages = {}
    for name, values, layout in (("grpo", grpo, "zero2"), ("kto", kto, "fsdp")):
        stages[f"{name}-one"] = stage(values, folder / f"{name}-one", 1)
        stages[f"{name}-two"] = stage(values, folder / f"{name}-two", 2, {"layout": layout})
    ends, errors = run_stages(folder, stages)
    assert all(set(end["codes"]) == {0} for end in ends.values()), errors
    return folder


@pytest.mark.parametrize("name", ["grpo", "kto"])
def test_two_processes_learn_what_one_does(runs, name):
    one, two = runs / f"{name}-one", runs / f"{name}-two"
    assert losses(two) == pytest.approx(losses(one), rel=1e-5, abs=1e-5)
    mine = load_file(two / "model" / "model.safetensors")
    theirs = load_file(one / "model" / "model.safetensors")
    for key, tensor in theirs.items():
        torch.testing.assert_close(mine[key], tensor, atol=1e-4, rtol=1e-3)


def test_rollouts_are_the_same_however_many_processes_sample(runs):
    def of(name):
        keys = ("rl/reward", "rl/kl_nats", "rl/length_tokens")
        lines = [m for m in read_metrics(runs / name) if "train/loss_nats" in m]
        return [[line[key] for key in keys if key in line] for line in lines]

    one, two = of("grpo-one"), of("grpo-two")
    assert any(one[0])
    assert two == [pytest.approx(values, abs=1e-5) for values in one]


def test_z_of_kto_is_that_of_the_whole_step(runs):
    def of(name):
        return [m["train/kl_nats"] for m in read_metrics(runs / name) if "train/kl_nats" in m]

    assert any(value > 1e-4 for value in of("kto-one"))
    assert of("kto-two") == pytest.approx(of("kto-one"), abs=1e-5)


def test_what_processes_cannot_share_is_refused_with_what_would_do(tmp_path, tiny_folder):
    grpo = rl_config(tmp_path, tiny_folder, GRPO, parallel={"layout": "fsdp"})
    reason = undivided_reason(grpo, build_objective(grpo.objective))
    assert "set parallel.layout to ddp, zero1 or zero2" in reason
    ppo = rl_config(tmp_path, tiny_folder, {"kind": "ppo"})
    assert "one process" in undivided_reason(ppo, build_objective(ppo.objective))
    with pytest.raises(ConfigError, match="the critic has an optimizer of its own"):
        verify_parallel(ppo)


def test_verify_proves_kto_and_lists_the_layouts_of_grpo_that_cannot(tmp_path, tiny_folder):
    kto = TrainConfig.model_validate(kto_values(tmp_path, tiny_folder))
    found = {each.layout: each.holds for each in verify_parallel(kto, steps=2)}
    assert found == {
        **dict.fromkeys(("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP"), True),
        "TP": None,
    }
    built_in = {"rewards": [{"function": "digits"}]}
    grpo = rl_config(tmp_path, tiny_folder, GRPO | built_in)
    findings = verify_parallel(grpo, steps=2)
    assert {each.layout: each.holds for each in findings} == {
        **dict.fromkeys(("DDP", "ZeRO-1", "ZeRO-2"), True),
        **dict.fromkeys(("ZeRO-3", "FSDP", "TP"), None),
    }
