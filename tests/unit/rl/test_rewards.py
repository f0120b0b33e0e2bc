"""Reward functions: what they return, how they are found, and what happens when they fail."""

import pytest
from pydantic import ValidationError

from easyllm.core.errors import ConfigError
from easyllm.rl.rewards import Answer, RewardFunctionConfig, RewardSum, load_reward
from easyllm.rl.running_moments import RunningMoments


def answer(text, **row):
    return Answer("2+3=", text, num_tokens=len(text), truncated=False, row={"answer": "5"} | row)


def value(function, given, row=None, **options):
    config = RewardFunctionConfig(function=function, options=options)
    return load_reward(config)(answer(given, **(row or {})))


@pytest.mark.parametrize(
    ("function", "text", "options", "expected"),
    [
        ("exact", " 5\n", {}, 1.0),
        ("exact", "55", {}, 0.0),
        ("exact", "2 and 3 make 5.", {"take": "last_number"}, 1.0),
        ("exact", "2 and 3 make 5.", {"take": "first_number"}, 0.0),
        ("exact", "five", {"take": "last_number"}, 0.0),
        ("contains", "it is 5", {}, 1.0),
        ("contains", "it is 5", {"text": "six"}, 0.0),
        ("format", "<a>\n5</a>", {"pattern": "<a>.*</a>"}, 1.0),
        ("format", "x<a>5</a>", {"pattern": "<a>.*</a>"}, 0.0),
        ("length", "abcd", {"target": 4}, 0.0),
        ("length", "abcd", {"target": 8, "tolerance": 2, "scale": 4.0}, -0.5),
        ("digits", "a1b2", {}, 0.5),
        ("digits", "", {}, 0.0),
    ],
)
def test_built_in_rewards(function, text, options, expected):
    assert value(function, text, **options) == expected


def test_right_digits_needs_the_right_length():
    assert value("right_digits", "105", {"answer": "115"}) == pytest.approx(2 / 3)
    assert value("right_digits", "15", {"answer": "115"}) == 0


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("Here:\n```python\ndef add(a, b):\n    return a + b\n```", 1.0),
        ("def add(a, b):\n    return a - b", 0.0),
        ("def add(a, b:", 0.0),
        (
            "import socket; socket.create_connection(('localhost', 1))\ndef add(a, b): return a+b",
            0.0,
        ),
        ("import subprocess; subprocess.run(['ls'])\ndef add(a, b): return a+b", 0.0),
        ("open('/etc/passwd')\ndef add(a, b): return a+b", 0.0),
        ("x = 'a' * 10**10\ndef add(a, b): return a+b", 0.0),
    ],
)
def test_code_is_run_in_a_process_with_limits(code, expected):
    assert value("code", code, {"tests": ["assert add(2, 3) == 5"]}) == expected


def test_code_that_loops_is_stopped():
    row = {"tests": "pass"}
    assert value("code", "while True: pass", row, timeout_s=0.5) == 0


def test_a_function_of_the_user_is_loaded_from_a_file_or_a_module(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def short(answer, most=3):\n    return float(answer.num_tokens <= most)\n")
    assert value(f"{file}:short", "abcd") == 0
    assert value(f"{file}:short", "abcd", most=4) == 1
    assert value("easyllm.rl.rewards:digits", "12") == 1


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        ("exakt", {}, "did you mean 'exact'"),
        ("nowhere.at_all:f", {}, "cannot be imported"),
        ("missing.py:f", {}, "does not exist"),
        ("easyllm.rl.rewards:nothing", {}, "has no function 'nothing'"),
        ("exact", {"tke": "all"}, "has no option 'tke'"),
        ("length", {}, "missing a required argument: 'target'"),
        ("length", {"target": -1}, "target=-1: input should be greater than or equal to 0"),
        ("length", {"target": 3, "scale": 0}, "scale=0: input should be greater than 0"),
        ("exact", {"take": "last"}, "'all', 'first_number' or 'last_number'"),
        ("format", {"pattern": "("}, "not a regular expression .* unterminated subpattern"),
        ("code", {"timeout_s": 0}, "timeout_s=0: input should be greater than 0"),
    ],
)
def test_a_function_that_does_not_exist_is_refused(function, options, words):
    with pytest.raises(ConfigError, match=words):
        load_reward(RewardFunctionConfig(function=function, options=options))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def f(:\n", "raised SyntaxError"),
        ("import nowhere_at_all\n", "cannot be imported"),
        ("1 / 0\n", "raised ZeroDivisionError: division by zero"),
        ("def f(): return 1\n", "too many positional arguments"),
        ("def f(answer, best): return 1\n", "missing a required argument: 'best'"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_before_any_answer(tmp_path, text, words):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_reward(RewardFunctionConfig(function=f"{file}:f"))


def test_rewards_are_summed_with_weights_and_a_failure_masks_the_answer():
    rewards = RewardSum(
        [
            RewardFunctionConfig(function="exact", weight=2.0),
            RewardFunctionConfig(function="digits", weight=0.5),
        ]
    )
    found = rewards([answer("5"), answer("x5")])
    assert found.totals == [2.5, 0.25]
    assert found.components == {"exact": [1.0, 0.0], "digits": [1.0, 0.5]}
    broken = RewardSum([RewardFunctionConfig(function="exact", options={"key": "none"})])(
        [answer("5")]
    )
    assert broken.failed == [True]
    assert broken.totals == [0.0]
    assert "raised KeyError: 'none' for prompt '2+3=', answer '5'" in broken.messages[0]


def test_running_moments_equal_those_of_all_values():
    moments, values = RunningMoments(), [3.0, -1.0, 4.0, 1.5, 9.0]
    moments.update(values[:2])
    moments.update(values[2:])
    mean = sum(values) / 5
    assert moments.mean == pytest.approx(mean)
    assert moments.std == pytest.approx((sum((v - mean) ** 2 for v in values) / 4) ** 0.5)
    assert RunningMoments().std == 1


# ---- configurations that make no sense


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kl": {"coefficient": -0.1}}, "greater than or equal to 0"),
        ({"rollout": {"group_size": 1}}, "set it to 2 or more"),
        ({"rewards": []}, "nothing gives a reward"),
        ({"kl": {"coefficient": 0.1, "estimator": "k1"}}, "gradient of expectation 0"),
        ({"kl": {"target": 1.0}}, "which is 0"),
        ({"rollout": {"top_p": 0.9, "epochs": 2}}, "renormalise=false"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(values, words):
    from easyllm.rl.config import GRPOConfig

    with pytest.raises(ValidationError, match=words):
        GRPOConfig.model_validate({"rewards": [{"function": "exact"}]} | values)


def test_the_preset_ppo_max_fills_in_what_the_recipe_leaves_out():
    from easyllm.rl.ppo_config import PPOConfig

    rewards = [{"function": "exact"}]
    found = PPOConfig.model_validate({"rewards": rewards, "preset": "ppo-max"})
    assert (found.kl.coefficient, found.kl.place) == (0.02, "reward")
    assert (found.normalise, found.clip_reward, found.clip_advantage) == ("running", 10, 0.5)
    assert (found.critic.rate_factor, found.critic.clip, found.loss.clip_high) == (3, 0.2, 0.2)
    own = {"rewards": rewards, "preset": "ppo-max", "kl": {"coefficient": 0.1}, "clip_reward": 5}
    changed = PPOConfig.model_validate(own)
    assert (changed.kl.coefficient, changed.kl.place, changed.clip_reward) == (0.1, "reward", 5)
    again = PPOConfig.model_validate(found.model_dump())
    assert again == found
