"""The doctor's checks on metrics that are written by hand; importing it loads no torch."""

import json
import subprocess
import sys

import pytest

from easyllm.core.errors import DataError
from easyllm.rl.doctor import CHECKS, diagnose, examine
from easyllm.rl.history import History

POLICY = {
    "rl/prompt_cut_share": 0.0,
    "rl/truncated_share": 0.05,
    "rl/equal_groups_share": 0.2,
    "rl/kl_pull": 0.01,
    "rl/kl_per_token_nats": 0.01,
    "rl/entropy": 1.0,
    "rl/masked_share": 0.0,
    "rl/ratio/below_0.5": 0.0,
    "rl/ratio/above_2": 0.0,
    "rl/clip_fraction": 0.05,
    "rl/update_kl_nats": 0.001,
    "rl/mismatch_nats": 1e-5,
    "rl/explained_variance": 0.5,
    "rl/length_tokens": 20.0,
    "rl/reward": 0.5,
    "rl/reward_std": 0.2,
    "rl/reward/exact": 0.4,
    "rl/reward/format": 0.6,
    "rl/reward_failures": 0.0,
}
PAIRS = {
    "train/loss_nats": 0.6,
    "rewards/chosen": 0.2,
    "rewards/rejected": -0.3,
    "eval/reward_accuracy": 0.7,
    "eval/reward_margin": 0.4,
}


def history(values, changes=None, steps=9, data=None):
    """Constant metrics, with others that move in a straight line from one value to another."""
    series = {name: [value] * steps for name, value in values.items()}
    for name, (first, last) in (changes or {}).items():
        series[name] = [first + (last - first) * i / (steps - 1) for i in range(steps)]
    return History(series, data=data or {})


def names(found):
    return [each.name for each in examine(found).findings]


@pytest.mark.parametrize("values", [POLICY, PAIRS, POLICY | PAIRS])
def test_usual_values_give_no_finding(values):
    assert names(history(values)) == []


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"rl/prompt_cut_share": (0.3, 0.3)}, "prompts_truncated"),
        ({"rl/truncated_share": (0.99, 1.0)}, "no_eos"),
        ({"rl/truncated_share": (0.1, 0.9)}, "truncated"),
        ({"rl/equal_groups_share": (0.5, 1.0)}, "equal_rewards"),
        ({"rl/kl_pull": (-0.1, -0.2)}, "kl_sign"),
        ({"rl/kl_per_token_nats": (0.0, 9.0)}, "learning_rate"),
        ({"rl/kl_per_token_nats": (0.0, 2.0)}, "kl"),
        ({"rl/entropy": (1.0, 0.01)}, "entropy"),
        ({"rl/entropy": (1.0, 4.0)}, "entropy"),
        ({"rl/masked_share": (0.95, 0.95)}, "masked"),
        ({"rl/ratio/above_2": (0.0, 0.2)}, "importance_ratios"),
        ({"rl/clip_fraction": (0.2, 0.6)}, "clip_fraction"),
        ({"rl/mismatch_nats": (0.1, 0.1)}, "mismatch"),
        ({"rl/explained_variance": (0.1, -0.5)}, "explained_variance"),
        ({"rl/length_tokens": (20.0, 80.0)}, "length_drift"),
        ({"rl/length_tokens": (20.0, 3.0)}, "length_drift"),
        ({"rl/reward": (0.2, 0.8), "rl/reward/format": (0.6, 0.1)}, "reward_components"),
        ({"rl/reward": (0.8, 0.2)}, "reward_falls"),
        ({"rl/reward_failures": (0.0, 2.0)}, "reward_failures"),
    ],
)
def test_each_check_names_its_fault(change, name):
    assert name in names(history(POLICY, change))


def test_shorter_answers_are_no_large_update():
    """KL of 3 nats over 20 tokens, then of 6 over 4: the same policy changes little per answer."""
    changes = {
        "rl/kl_per_token_nats": (0.15, 1.5),
        "rl/kl_nats": (3.0, 6.0),
        "rl/length_tokens": (20.0, 4.0),
    }
    found = history(POLICY)
    for name, (first, last) in changes.items():
        found.series[name] = [first] * 5 + [last] * 4
    assert "learning_rate" not in names(found)


def test_steps_with_nearly_equal_rewards_say_little_about_the_critic():
    found = history(POLICY, steps=9)
    found.series["rl/explained_variance"] = [0.3] * 7 + [-5.0, 0.3]
    found.series["rl/reward_std"] = [0.3] * 7 + [0.01, 0.3]
    assert "explained_variance" not in names(found)
    found.series["rl/reward_std"] = [0.3] * 9
    assert "explained_variance" in names(found)


@pytest.mark.parametrize(
    ("dtype", "nats", "found"),
    [
        ("float32", 0.01, []),
        ("float32", 0.03, ["mismatch"]),
        ("bfloat16", 0.03, []),
        ("bfloat16", 0.1, ["mismatch"]),
    ],
)
def test_a_mismatch_is_judged_by_the_rounding_of_the_dtype(tmp_path, dtype, nats, found):
    row = POLICY | {"rl/mismatch_nats": nats}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(9)))
    (tmp_path / "manifest.json").write_text(json.dumps({"results": {"dtype": dtype}}))
    assert [each.name for each in diagnose(tmp_path).findings] == found


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"eval/reward_accuracy": (0.6, 0.45)}, "reward_accuracy"),
        ({"eval/reward_margin": (0.4, -0.1)}, "reward_margin"),
        ({"rewards/chosen": (0.0, -9.0)}, "chosen_falls"),
        ({"train/loss_nats": (0.7, 40.0)}, "learning_rate"),
    ],
)
def test_preference_runs_are_checked_too(change, name):
    assert names(history(PAIRS, change)) == [name]


def test_rows_that_were_truncated_are_counted_in_the_manifest():
    assert names(history(PAIRS, data={"rows": 100, "cut": 30})) == ["prompts_truncated"]
    assert names(history(PAIRS, data={"rows": 100, "cut": 0})) == []


def test_what_does_not_apply_is_left_out():
    assert "explained_variance" not in examine(history(PAIRS)).checked
    assert "reward_accuracy" not in examine(history(POLICY)).checked
    assert set(examine(history(POLICY | PAIRS)).checked) == set(CHECKS)


def test_a_folder_without_metrics_is_refused(tmp_path):
    with pytest.raises(DataError, match="give the output folder of a training run"):
        diagnose(tmp_path)


def test_a_damaged_line_is_skipped_and_the_rest_is_read(tmp_path):
    lines = [json.dumps({"step": i, "rl/truncated_share": 1.0}) for i in range(9)]
    text = "\n".join([*lines, '{"step": 9, "rl/trunc'])
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    assert [each.name for each in diagnose(tmp_path).findings] == ["no_eos", "truncated"]


def test_the_doctor_loads_no_torch():
    code = "import easyllm.rl.doctor, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
