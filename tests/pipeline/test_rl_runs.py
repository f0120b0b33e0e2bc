"""Policy-gradient runs from recipe to result: they learn, resume bitwise, and log what they do."""

import json

import pytest

from easyllm.core.errors import ConfigError
from easyllm.models import load_model, save_model, to_classifier
from easyllm.rl.rewards import REWARDS, RewardError
from easyllm.train import Callback, TrainConfig, train
from easyllm.train.metrics import read_metrics
from rl_runs import PROMPTS, metrics_of, rl_config
from tiny_models import build_tiny

LORA = {"kind": "lora", "rank": 4}
TWO_UPDATES = {"rollout": {"epochs": 2, "minibatches": 2, "max_tokens": 6, "group_size": 4}}
KL = {"kl": {"coefficient": 0.02, "estimator": "k3"}}


class Killed(Exception):
    pass


class KillIn(Callback):
    """Fails in a step, so that the step before is the newest checkpoint."""

    def __init__(self, step):
        self.step = step

    def after_backward(self, run, info):
        if info.step == self.step:
            raise Killed


def test_grpo_raises_a_reward_with_lora(tiny_folder, tmp_path):
    train(rl_config(tmp_path, tiny_folder, KL, adapter=LORA, max_steps=40), tmp_path / "run")
    lines = metrics_of(tmp_path / "run")
    rewards = [line["rl/reward"] for line in lines]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1
    assert all(line["rl/kl_pull"] >= 0 for line in lines)
    assert lines[0]["rl/kl_nats"] == pytest.approx(0, abs=1e-4)
    assert lines[-1]["rl/kl_nats"] > lines[0]["rl/kl_nats"]
    assert all(line["rl/mismatch_nats"] < 1e-4 for line in lines)
    names = ("rl/entropy", "rl/clip_fraction", "rl/length_tokens", "rl/truncated_share")
    assert all(name in lines[0] for name in (*names, "rl/masked_share", "rl/reward/even_tokens"))


@pytest.mark.parametrize(
    "objective",
    [
        KL | TWO_UPDATES,
        {"advantage": "rloo", "equal_groups": "resample", "max_resamples": 1},
        {
            "kind": "ppo",
            "preset": "ppo-max",
            "rollout": {"epochs": 2, "max_tokens": 6},
            "critic": {"warm_up": 1},
        },
        {"kind": "ppo", "critic": {"body": "shared"}},
    ],
    ids=["grpo-two-updates", "rloo-resampled", "ppo-max", "ppo-shared-body"],
)
@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_a_killed_run_resumes_bitwise_with_its_rollouts(objective, adapter, tiny_folder, tmp_path):
    config = rl_config(tmp_path, tiny_folder, objective, adapter=adapter, max_steps=6)
    train(config, tmp_path / "whole")
    for step in (1, 3):
        with pytest.raises(Killed):
            train(config, tmp_path / "broken", callbacks=[KillIn(step)])
    train(config, tmp_path / "broken")
    assert metrics_of(tmp_path / "broken") == metrics_of(tmp_path / "whole")
    part = "model" if adapter is None else "adapter"
    files = [next((tmp_path / run / part).glob("*.safetensors")) for run in ("whole", "broken")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_critic_learns_first_and_then_explains_the_returns(tiny_folder, tmp_path):
    objective = {
        "kind": "ppo",
        "critic": {"warm_up": 3, "rate_factor": 3.0},
        "rollout": {"group_size": 4, "max_tokens": 6},
    }
    train(rl_config(tmp_path, tiny_folder, objective, max_steps=12), tmp_path / "run")
    lines = metrics_of(tmp_path / "run")
    assert lines[0]["rl/value"] == 0  # the head starts at zero
    assert lines[0]["train/loss_nats"] == lines[2]["train/loss_nats"] == 0
    assert lines[2]["rl/kl_nats"] == pytest.approx(0, abs=1e-5)  # the actor has not moved
    assert lines[-1]["rl/kl_nats"] > 1e-4
    assert lines[-1]["rl/value"] != 0


def test_a_reward_that_fails_stops_the_run_after_three_failures(tiny_folder, tmp_path, capsys):
    calls = []

    def fails(answer):
        calls.append(answer)
        if len(calls) in (2, 20, 30):
            return float("nan") if len(calls) == 20 else 1 / 0
        return 1.0

    REWARDS["fails"] = fails
    try:
        config = rl_config(tmp_path, tiny_folder, {"rewards": [{"function": "fails"}]})
        with pytest.raises(RewardError, match="have failed 3 times, the last time: reward 'fails'"):
            train(config, tmp_path / "run")
    finally:
        del REWARDS["fails"]
    err = " ".join(capsys.readouterr().err.split())
    assert "raised ZeroDivisionError: division by zero for prompt" in err
    assert "returned nan for prompt" in err
    assert metrics_of(tmp_path / "run")[0]["rl/reward_failures"] == 1
    assert metrics_of(tmp_path / "run")[0]["rl/masked_share"] > 0


def test_dropout_is_refused(tiny_folder, tmp_path):
    config = rl_config(tmp_path, tiny_folder, dropout=0.1)
    with pytest.raises(ConfigError, match="set dropout=0"):
        train(config, tmp_path / "run")


def test_a_sampler_of_another_policy_is_noticed_and_can_be_corrected(tiny_folder, tmp_path):
    quantized = {"rollout": {"quantize": "int8", "max_tokens": 6, "group_size": 4}}
    train(rl_config(tmp_path, tiny_folder, quantized, max_steps=2), tmp_path / "run")
    plain = metrics_of(tmp_path / "run")
    assert all(line["rl/mismatch_nats"] > 1e-4 for line in plain)
    masked = quantized | {"mismatch": {"correction": "mask", "cap": 1.02}}
    train(rl_config(tmp_path, tiny_folder, masked, max_steps=2), tmp_path / "masked")
    found = metrics_of(tmp_path / "masked")
    assert all(line["rl/mismatch_masked_share"] > 0 for line in found)
    assert all(
        line["train/trained_tokens"] < before["train/trained_tokens"]
        for line, before in zip(found[:1], plain[:1], strict=True)
    )


def test_sums_are_learned_from_a_warm_start(tmp_path):
    from easyllm.pipeline.recipe import find_recipe, load_train_recipe

    words = [
        *(
            "max_steps=2",
            "eval_every=1",
            "batch_size=4",
            "objective.warm_start.steps=3",
            "data.held_out=8",
        ),
        *("objective.rollout.group_size=4", "data.count=40", "model.config.hidden_size=32"),
        "objective.equal_groups=keep",
        f"output={tmp_path / 'run'}",
    ]
    config = load_train_recipe(find_recipe("grpo-arithmetic"), words)
    result = train(config, tmp_path / "run")
    assert 0 <= result.figures["eval_reward/exact"] <= 1
    evaluated = [line["step"] for line in read_metrics(tmp_path / "run") if "eval/reward" in line]
    assert evaluated == [0, 1, 2]  # the first one is that of the warm start
    lines = metrics_of(tmp_path / "run")
    assert lines[0]["rl/kl_nats"] == pytest.approx(0, abs=1e-4)  # the reference is the warm start
    recipe = (tmp_path / "run" / "recipe.yaml").read_text(encoding="utf-8")
    assert json.dumps("arithmetic")[1:-1] in recipe


def test_a_warm_start_replays_what_the_model_had_learned(tiny_folder, tmp_path):
    """Without a replay, the loss of earlier conversations is far larger after the warm start."""
    rows = [{"prompt": f"box {n}", "completion": f"{n} is {n % 3}"} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses = {}
    for replay in ([], [str(tmp_path / "rows.jsonl")]):
        start = {"steps": 40, "batch_size": 8, "learning_rate": 1e-2, "replay": replay}
        output = tmp_path / f"replay-{len(replay)}"
        train(rl_config(tmp_path, tiny_folder, {"warm_start": start}, max_steps=1), output)
        data = {"train": [str(tmp_path / "rows.jsonl")], "max_seq_len": 64}
        tuned = {"model": str(output / "model"), "data": data, "max_steps": 1, "batch_size": 6}
        train(TrainConfig.model_validate(tuned | {"precision": "fp32"}), output / "after")
        losses[len(replay)] = read_metrics(output / "after")[0]["train/loss_nats"]
    assert losses[1] < 0.5 * losses[0]


@pytest.mark.parametrize("storage", ["nf4", "int8"])
@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_an_adapter_on_a_quantized_base_is_sampled_and_trained(
    kind, storage, tiny_folder, tmp_path
):
    objective = {"kind": kind} | KL
    if kind == "ppo":
        objective["critic"] = {"body": "shared"}
    config = rl_config(
        tmp_path, tiny_folder, objective, adapter=LORA, quantize=storage, max_steps=3
    )
    train(config, tmp_path / "run")
    lines = metrics_of(tmp_path / "run")
    # trainer and reference compute the same; the sampler's kernel quantizes activations, too
    assert lines[0]["rl/kl_nats"] == pytest.approx(0, abs=1e-4)
    assert all(line["rl/mismatch_nats"] < 0.2 for line in lines)
    assert lines[-1]["rl/kl_nats"] > lines[0]["rl/kl_nats"]
    assert load_model(tiny_folder, adapter=tmp_path / "run" / "adapter").is_adapted


def test_ppo_with_a_reward_model_and_a_pretraining_mix_resumes_bitwise(
    tiny_folder, tiny_tokenizer, tmp_path
):
    reward = to_classifier(build_tiny(2), 1, seed=1)
    save_model(reward, tmp_path / "reward", tokenizer=tiny_tokenizer)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{p} and more"}) + "\n" for p in PROMPTS))
    objective = {
        "kind": "ppo",
        "preset": "ppo-max",
        "rewards": [],
        "reward_model": {"model": str(tmp_path / "reward"), "weight": 2.0},
        "pretraining": {"files": [str(texts)], "batch_size": 2, "coefficient": 1.0},
        "critic": {"warm_up": 2},
        "rollout": {"max_tokens": 6},
    }
    # two micro-batches: the mix counts once
    config = rl_config(tmp_path, tiny_folder, objective, max_steps=8, micro_batch_tokens=64)
    train(config, tmp_path / "whole")
    with pytest.raises(Killed):
        train(config, tmp_path / "broken", callbacks=[KillIn(5)])
    train(config, tmp_path / "broken")
    lines = metrics_of(tmp_path / "whole")
    assert lines == metrics_of(tmp_path / "broken")
    assert [("rl/pretraining_nats" in line) for line in lines] == [False] * 2 + [True] * 6
    mixed = [line["rl/pretraining_nats"] for line in lines[2:]]
    assert 4 < mixed[0] < 8  # ln 320 = 5.8
    assert min(mixed) < mixed[0]
    assert lines[1]["rl/kl_nats"] == pytest.approx(0, abs=1e-5)  # only the critic has learned
    assert all(line["rl/reward"] == pytest.approx(2 * line["rl/reward/model"]) for line in lines)
