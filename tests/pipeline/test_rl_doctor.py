"""Five faults are planted in micro runs, and the doctor names each; a run without them has none."""

import json

import pytest
from typer.testing import CliRunner

from easyllm.cli.main import app_for
from easyllm.rl.doctor import diagnose
from easyllm.rl.policy import PolicyObjective
from easyllm.rl.rewards import REWARDS
from easyllm.train import train
from rl_runs import rl_config

KL = {"kl": {"coefficient": 0.05, "estimator": "k3"}}
LORA = {"kind": "lora", "rank": 4}
RATE = {"learning_rate": 3e-4}
FAULTS = ("equal_rewards", "kl_sign", "no_eos", "prompts_truncated", "learning_rate")


def names(run):
    return {finding.name for finding in diagnose(run).findings}


def sampling(**changes):
    return {"rollout": {"group_size": 4, "max_tokens": 6, "stop": ["e", "a", "o", " "]} | changes}


@pytest.fixture(scope="module")
def sound(tiny_folder, tmp_path_factory):
    """A run without faults: answers end, and rewards differ."""
    folder = tmp_path_factory.mktemp("sound")
    config = rl_config(folder, tiny_folder, KL | sampling(), adapter=LORA, optimizer=RATE)
    train(config, folder / "run")
    return folder / "run"


def test_a_run_without_faults_has_none_of_them(sound):
    assert not names(sound) & set(FAULTS)
    assert set(FAULTS) <= set(diagnose(sound).checked)


def test_equal_rewards(tiny_folder, tmp_path):
    REWARDS["constant"] = lambda _answer: 1.0
    try:
        config = rl_config(tmp_path, tiny_folder, {"rewards": [{"function": "constant"}]})
        train(config, tmp_path / "run")
    finally:
        del REWARDS["constant"]
    assert "equal_rewards" in names(tmp_path / "run")


def test_a_kl_penalty_of_the_wrong_sign(tiny_folder, tmp_path, monkeypatch):
    right = PolicyObjective.start

    def start(self, setup):
        right(self, setup)
        self.controller.coefficient *= -1  # the configuration would refuse it

    monkeypatch.setattr(PolicyObjective, "start", start)
    train(rl_config(tmp_path, tiny_folder, KL, adapter=LORA), tmp_path / "run")
    assert "kl_sign" in names(tmp_path / "run")


def test_eos_is_never_sampled(tiny_folder, tmp_path):
    objective = {"rollout": {"group_size": 4, "max_tokens": 2}}
    train(rl_config(tmp_path, tiny_folder, objective), tmp_path / "run")
    assert "no_eos" in names(tmp_path / "run")


def test_prompts_are_truncated(tiny_folder, tmp_path):
    config = rl_config(tmp_path, tiny_folder)
    data = config.data.model_copy(update={"max_seq_len": 8, "overlong": "cut"})
    train(config.model_copy(update={"data": data}), tmp_path / "run")
    assert "prompts_truncated" in names(tmp_path / "run")


def test_a_learning_rate_that_is_a_hundred_times_too_high(tiny_folder, tmp_path):
    rate = {"learning_rate": 100 * RATE["learning_rate"]}
    config = rl_config(tmp_path, tiny_folder, KL | sampling(), adapter=LORA, optimizer=rate)
    train(config, tmp_path / "run")
    assert "learning_rate" in names(tmp_path / "run")


def test_the_command_prints_findings_and_exits_with_one(tiny_folder, tmp_path):
    objective = {"rollout": {"group_size": 4, "max_tokens": 2}}
    train(rl_config(tmp_path, tiny_folder, objective, max_steps=2), tmp_path / "run")
    app = app_for(["rl"])
    shown = CliRunner().invoke(app, ["rl", "doctor", str(tmp_path / "run")])
    assert shown.exit_code == 1
    assert "no_eos: rl/truncated_share = 1 (usual: below 0.2)" in shown.stdout
    found = CliRunner().invoke(app, ["rl", "doctor", str(tmp_path / "run"), "--json"])
    assert found.exit_code == 1
    values = json.loads(found.stdout)
    assert values["healthy"] is False
    assert {"name", "metric", "value", "usual", "change"} == values["findings"][0].keys()
