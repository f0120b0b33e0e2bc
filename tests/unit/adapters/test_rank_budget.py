"""AdaLoRA's scores against the equations of the paper, and exact budgets."""

import pytest
import torch
from torch import nn

from easyllm.adapters.rank_budget import RankBudget

BETA_1, BETA_2 = 0.85, 0.7


class Module(nn.Module):
    def __init__(self, rank, inputs, outputs, generator):
        super().__init__()
        shapes = {"lora_A": (rank, inputs), "lora_E": (rank, 1), "lora_B": (outputs, rank)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator)))
        self.register_buffer("keeps", torch.ones(rank, dtype=torch.bool))


def modules(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"one": Module(4, 6, 5, generator), "two": Module(4, 3, 7, generator)}


def step(held, generator, budget=None, scale=1.0):
    """Sets random gradients, and changes the weights as an optimizer would."""
    for module in held.values():
        for parameter in (module.lora_A, module.lora_E, module.lora_B):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    if budget is not None:
        budget.keep_gradients(scale)
    with torch.no_grad():
        for module in held.values():
            for parameter in (module.lora_A, module.lora_E, module.lora_B):
                parameter.sub_(0.1 * parameter.grad)
    if budget is not None:
        budget.update_scores()


def paper(weights, gradients):
    """Equations 8 to 11 for one matrix, entry by entry: s = Ī Ū after all steps."""
    mean = spread = 0.0
    for w, g in zip(weights, gradients, strict=True):
        sensitivity = abs(w * g)  # eq. 8
        mean = BETA_1 * mean + (1 - BETA_1) * sensitivity  # eq. 9
        spread = BETA_2 * spread + (1 - BETA_2) * abs(sensitivity - mean)  # eq. 10
    return mean * spread  # eq. 11


def test_scores_are_those_of_the_paper():
    held = modules()
    budget = RankBudget(held, BETA_1, BETA_2)
    generator = torch.Generator().manual_seed(1)
    history = []
    for _ in range(3):
        step(held, generator, budget)
        history.append(
            {
                (name, letter): (getattr(m, letter).detach().clone(), getattr(m, letter).grad)
                for name, m in held.items()
                for letter in ("lora_A", "lora_E", "lora_B")
            }
        )

    def s(name, letter, row, column):
        entries = [
            (one[name, letter][0][row, column].item(), one[name, letter][1][row, column].item())
            for one in history
        ]
        return paper(*zip(*entries, strict=True))

    for name, module in held.items():
        (rank, inputs), outputs = module.lora_A.shape, len(module.lora_B)
        for k in range(rank):  # eq. 6
            expected = (
                s(name, "lora_E", k, 0)
                + sum(s(name, "lora_B", j, k) for j in range(outputs)) / outputs
                + sum(s(name, "lora_A", k, j) for j in range(inputs)) / inputs
            )
            assert budget.scores()[name][k].item() == pytest.approx(expected, rel=1e-5)


def test_scaled_gradients_give_the_same_scores():
    plain, scaled = modules(), modules()
    one, other = RankBudget(plain, BETA_1, BETA_2), RankBudget(scaled, BETA_1, BETA_2)
    step(plain, torch.Generator().manual_seed(1), one)
    step(scaled, torch.Generator().manual_seed(1), other, scale=0.25)
    for name, scores in one.scores().items():
        torch.testing.assert_close(other.scores()[name], scores / 16)  # s is a product of two


def test_a_skipped_step_changes_no_score():
    held = modules()
    budget = RankBudget(held, BETA_1, BETA_2)
    step(held, torch.Generator().manual_seed(1), budget)
    before = {name: scores.clone() for name, scores in budget.scores().items()}
    budget.update_scores()
    assert all(torch.equal(budget.scores()[name], before[name]) for name in before)


@pytest.mark.parametrize("budget", range(9))
def test_exactly_the_best_triplets_are_kept(budget):
    held = modules()
    ranked = RankBudget(held, BETA_1, BETA_2)
    step(held, torch.Generator().manual_seed(1), ranked)
    together = torch.cat([ranked.scores()[name] for name in held])
    ranked.prune(budget)
    kept = torch.cat([module.keeps for module in held.values()])
    assert int(kept.sum()) == budget
    if 0 < budget < 8:
        assert together[kept].min() > together[~kept].max()
    values = torch.cat([module.lora_E.flatten() for module in held.values()])
    assert torch.equal(values != 0, kept)


def test_budgets_are_exact_among_equal_scores():
    """A threshold would keep all of them or none: nothing has been scored yet."""
    held = modules()
    budget = RankBudget(held, BETA_1, BETA_2)
    budget.prune(5)
    assert held["one"].keeps.tolist() == [True] * 4
    assert held["two"].keeps.tolist() == [True, False, False, False]


def test_a_pruned_triplet_may_return_until_the_budget_is_final():
    held = modules()
    budget = RankBudget(held, BETA_1, BETA_2)
    budget.prune(1)
    with torch.no_grad():
        for module in held.values():
            module.lora_E.fill_(1.0)
    budget.prune(8)
    assert all(bool(module.lora_E.all()) for module in held.values())


def test_the_state_contains_every_score():
    held = modules()
    budget = RankBudget(held, BETA_1, BETA_2)
    step(held, torch.Generator().manual_seed(1), budget)
    again = RankBudget(modules(), BETA_1, BETA_2)
    for name, tensor in again.state().items():
        tensor.copy_(budget.state()[name])
    assert len(again.state()) == 2 * 2 * 3
    for name, scores in budget.scores().items():
        assert torch.equal(again.scores()[name], scores)
