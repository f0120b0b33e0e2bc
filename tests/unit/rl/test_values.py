"""The gridworld's solvers agree with each other, and temporal differences with both."""

import pytest
import torch

from easyllm.core.errors import ConfigError
from easyllm.rl.gridworld import build_gridworld
from easyllm.rl.values import (
    evaluate_policy,
    one_hot_policy,
    policy_iteration,
    sample_episode,
    td_lambda,
    value_iteration,
)


def uniform(process):
    return torch.full(process.transitions.shape[:2], 0.25, dtype=torch.float64)


def test_value_iteration_and_policy_iteration_find_the_same_values():
    process = build_gridworld().process
    values, policies = value_iteration(process), policy_iteration(process)
    torch.testing.assert_close(values.values, policies.values, atol=1e-10, rtol=0)
    q = process.action_values(values.values)
    best = q.gather(1, policies.policy[:, None]).squeeze(1)
    torch.testing.assert_close(best, q.amax(1), atol=1e-10, rtol=0)


def test_a_corridor_without_slip_has_the_values_of_its_discounted_rewards():
    process = build_gridworld(["S..G"], slip=0.0, step_reward=-0.1, discount=0.9).process
    found = value_iteration(process).values
    expected = torch.tensor([0.81 - 0.1 - 0.09, 0.9 - 0.1, 1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(found, expected)


def test_probabilities_sum_to_one_and_terminal_states_are_worth_nothing():
    process = build_gridworld().process
    ones = torch.ones(process.transitions.shape[:2], dtype=torch.float64)
    torch.testing.assert_close(process.transitions.sum(-1), ones)
    assert float(evaluate_policy(process, uniform(process))[process.terminal].abs().max()) == 0


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_td_lambda_approaches_the_exact_values_of_a_policy(lam):
    process = build_gridworld(["S.G", ".X."], slip=0.1).process
    policy = uniform(process)
    generator = torch.Generator().manual_seed(0)
    episodes = [sample_episode(process, policy, generator) for _ in range(1500)]
    found = td_lambda(process, episodes, lam=lam, learning_rate=0.2, decay=50)
    exact = evaluate_policy(process, policy)
    visited = sorted({state for episode in episodes for state in episode.states})
    assert float((found - exact)[visited].abs().max()) < 0.12
    assert float((torch.zeros_like(exact) - exact)[visited].abs().max()) > 0.3


def test_the_greedy_policy_is_better_than_a_random_one_from_the_start():
    process = build_gridworld().process
    greedy = evaluate_policy(process, one_hot_policy(process, value_iteration(process).policy))
    assert float(greedy[process.start]) > float(evaluate_policy(process, uniform(process))[0]) + 1


@pytest.mark.parametrize(
    ("rows", "words"), [(["S.", "G"], "one length"), (["..G"], "one start"), (["S?G"], "cells")]
)
def test_a_grid_that_is_none_is_refused(rows, words):
    with pytest.raises(ConfigError, match=words):
        build_gridworld(rows)


def test_the_command_shows_grids_and_small_differences():
    from easyllm.rl.gridworld_report import gridworld_report

    report = gridworld_report(episodes=200)
    assert report.grids["best policy"][-1].endswith("*")
    assert report.errors["value iteration against policy iteration"] < 1e-9
    assert max(report.errors.values()) < 0.6
    assert set(report.as_dict()) == {"grids", "errors"}
