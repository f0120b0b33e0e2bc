"""Policy-gradient runs that SIGKILL ends anywhere resume to the same bits, rollouts included."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rl_runs import metrics_of, rl_config

SCRIPT = Path(__file__).parents[1] / "support" / "killed_runs.py"
OBJECTIVES = {
    "grpo": {
        "kl": {"coefficient": 0.02, "estimator": "k3"},
        "rollout": {"epochs": 2, "minibatches": 2, "max_tokens": 6, "group_size": 4},
    },
    "ppo": {
        "kind": "ppo",
        "preset": "ppo-max",
        "rollout": {"epochs": 2, "max_tokens": 6},
        "critic": {"warm_up": 1},
    },
}


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_run_killed_anywhere_resumes_bitwise(kind, tiny_folder, tmp_path):
    config = rl_config(tmp_path, tiny_folder, OBJECTIVES[kind], max_steps=6)
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json(), encoding="utf-8")
    command = [sys.executable, str(SCRIPT), str(path), str(tmp_path), "3", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout.splitlines()[-1])["killed_at"]) == 3
    assert metrics_of(tmp_path / "broken") == metrics_of(tmp_path / "whole")
    files = [next((tmp_path / run / "model").glob("*.safetensors")) for run in ("whole", "broken")]
    assert files[0].read_bytes() == files[1].read_bytes()
