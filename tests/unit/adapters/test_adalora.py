"""AdaLoRA: the schedule, the loss term, pruned ranks in files, and resuming."""

import json

import pytest
import torch
from safetensors.torch import load_file

from adapter_kinds import model_with
from easyllm.adapters import (
    AdaLoRA,
    AdaLoRAConfig,
    StepInfo,
    attach,
    load_adapter,
    merge,
    save_adapter,
)
from easyllm.core.errors import CheckpointError, ConfigError
from easyllm.models import hf_module_name
from easyllm.nn.context import ForwardContext
from easyllm.nn.linear import BaseLinear, Linear
from tiny_models import build_tiny

IDS = torch.arange(5, 45)
TARGETS = ("q_proj", "v_proj", "down_proj")
CONFIG = AdaLoRAConfig(
    init_rank=4,
    rank=2,
    alpha=8,
    targets=TARGETS,
    warmup_steps=2,
    final_steps=3,
    interval=2,
)
TOTAL = 12


class Training:
    """Trains a tiny model with plain AdamW, with the hooks of the trainer."""

    def __init__(self, config=CONFIG, total=TOTAL):
        self.model, self.total, self.done = build_tiny(), total, 0
        self.adapters = attach(self.model, config)
        self.trained = self.adapters.trained_parameters(self.model)
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=1e-2)

    def steps(self, count):
        ids = torch.randint(3, 300, (self.total, 16), generator=torch.Generator().manual_seed(0))
        for row in ids[self.done : self.done + count]:
            context = ForwardContext.packed([len(row)])
            logits = self.model.head(self.model(row, context), context)
            loss = torch.nn.functional.cross_entropy(logits[:-1], row[1:])
            (loss + self.adapters.loss()).backward()
            self.adapters.after_backward(StepInfo(step=self.done, total_steps=self.total))
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.done += 1
            self.adapters.after_step(StepInfo(step=self.done, total_steps=self.total))
        return self

    def kept(self):
        return sum(int(a.keeps.sum()) for _, a in self.adapters.linears.values())


def test_the_schedule_falls_with_the_cube_of_the_remaining_steps():
    adapters = attach(build_tiny(), CONFIG)  # 6 linears: from 24 triplets to 12
    expected = [24] * 3
    expected += [int(12 + 12 * (1 - (t - 2) / (12 - 3 - 2)) ** 3) for t in range(3, 9)]
    expected += [12] * 4
    assert [adapters.kept_after(step, TOTAL) for step in range(TOTAL + 1)] == expected
    assert expected[3:6] == [19, 16, 14]


def test_the_default_schedule_is_a_tenth_and_three_tenths_of_the_run():
    config = AdaLoRAConfig()
    assert config.phases(100) == (10, 30)
    assert config.phases(1000) == (100, 300)
    assert config.model_copy(update={"warmup_steps": 0}).phases(100) == (0, 30)


@pytest.mark.parametrize(
    ("warmup", "final", "total", "fits"), [(2, 3, 6, True), (2, 3, 5, False), (0, 0, 1, True)]
)
def test_a_schedule_longer_than_the_run_is_refused(warmup, final, total, fits):
    config = AdaLoRAConfig(warmup_steps=warmup, final_steps=final)
    if fits:
        config.check_steps(total)
    else:
        with pytest.raises(ConfigError, match="leave no step for pruning in a run of 5 steps"):
            config.check_steps(total)


def test_triplets_are_pruned_at_every_interval_and_in_the_last_step_of_the_budget():
    run, kept = Training(), []
    for _ in range(TOTAL):
        run.steps(1)
        kept.append(run.kept())
    # pruned after steps 4, 6, 8 (multiples of the interval) and 9 (final)
    assert kept == [24, 24, 24, 16, 16, 12, 12, 12, 12, 12, 12, 12]


def test_the_final_ranks_sum_to_the_target_and_stay():
    run = Training().steps(9)
    final = {name: a.keeps.clone() for name, (_, a) in run.adapters.linears.items()}
    assert run.kept() == 2 * len(final)
    run.steps(3)
    for name, (_, adapter) in run.adapters.linears.items():
        assert torch.equal(adapter.keeps, final[name])
        assert torch.equal(adapter.lora_E.flatten() != 0, final[name])


def test_pruned_triplets_may_return_before_the_budget_is_final():
    run = Training().steps(5)  # pruned after step 4, trained on in step 5
    pruned = torch.cat([a.lora_E.flatten()[~a.keeps] for _, a in run.adapters.linears.values()])
    assert bool(pruned.any())


def test_a_resumed_run_is_bitwise_the_same_through_pruning():
    whole = Training().steps(TOTAL)
    for stop in (1, 3, 4, 5, 8, 9, 10):
        first, second = Training().steps(stop), Training()
        second.done = stop
        with torch.no_grad():
            for name, parameter in second.trained.items():
                parameter.copy_(first.trained[name])
        second.optimizer.load_state_dict(first.optimizer.state_dict())
        second.adapters.load_state(first.adapters.state())
        second.steps(TOTAL - stop)
        for name, parameter in whole.trained.items():
            assert torch.equal(second.trained[name], parameter), (stop, name)
        assert second.kept() == whole.kept()


def test_without_the_scores_a_resumed_run_would_be_another():
    """Otherwise the test above could not fail."""
    first, second = Training().steps(5), Training()
    names = first.adapters.state()
    assert sum(name.startswith("sensitivity.") for name in names) == 6 * 3
    assert sum(name.startswith("uncertainty.") for name in names) == 6 * 3
    assert sum(name.endswith(".keeps") for name in names) == 6
    with pytest.raises(CheckpointError, match="has no "):
        second.adapters.load_state({n: t for n, t in names.items() if "uncertainty" not in n})


# ---- the module


def module_of(rank=3, *, dropout=0.0):
    linear = Linear(10, 7, bias=True).requires_grad_(False)
    linear.reset_parameters(0.3, torch.Generator().manual_seed(0))
    adapter = AdaLoRA(rank, 1.5, 10, 7, dropout=dropout)
    for number, parameter in enumerate(adapter.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    return linear, adapter


def test_the_output_is_that_of_the_formula():
    linear, adapter = module_of()
    x = torch.randn(4, 10, generator=torch.Generator().manual_seed(9))
    update = adapter.lora_B @ torch.diag(adapter.lora_E.flatten()) @ adapter.lora_A
    expected = x @ (linear.weight + 1.5 * update).T + linear.bias
    torch.testing.assert_close(adapter(x, BaseLinear(linear)), expected, atol=1e-5, rtol=1e-5)


def test_a_linear_without_triplets_is_the_base():
    linear, adapter = module_of(rank=0)
    x = torch.ones(4, 10)
    assert torch.equal(adapter(x, BaseLinear(linear)), BaseLinear(linear)(x))
    deterministic = BaseLinear(linear, ForwardContext.packed([4], deterministic=True))
    assert torch.equal(adapter(x, deterministic), deterministic(x))
    assert torch.equal(adapter.merged(linear.weight, linear.bias)[0], linear.weight)
    assert float(adapter.orthogonality().detach()) == 0


def test_orthogonal_matrices_have_no_loss():
    _, adapter = module_of()
    adapter.requires_grad_(False)
    adapter.lora_A.copy_(torch.linalg.qr(adapter.lora_A.T)[0].T)
    adapter.lora_B.copy_(torch.linalg.qr(adapter.lora_B)[0])
    assert float(adapter.orthogonality()) == pytest.approx(0, abs=1e-5)
    adapter.lora_A.mul_(2**0.5)  # Q Qᵀ = 2 I
    assert float(adapter.orthogonality()) == pytest.approx(3**0.5, abs=1e-5)


def test_the_loss_is_the_weighted_mean_over_all_matrices():
    model = build_tiny()
    adapters = attach(model, CONFIG.model_copy(update={"orthogonality": 0.2}))
    norms = [
        torch.linalg.matrix_norm(matrix @ matrix.T - torch.eye(4))
        for _, a in adapters.linears.values()
        for matrix in (a.lora_A, a.lora_B.T)
    ]
    expected = 0.2 * float(sum(norms).detach()) / len(norms)
    assert float(adapters.loss().detach()) == pytest.approx(expected, rel=1e-6)
    without = attach(build_tiny(), CONFIG.model_copy(update={"orthogonality": 0.0}))
    assert without.loss() is None


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_factors_of_the_loss_give_the_output(dropout):
    linear, adapter = module_of(dropout=dropout)
    linear.bias = None
    x = torch.randn(4, 10, generator=torch.Generator().manual_seed(9))
    torch.manual_seed(0)
    expected = adapter(x, BaseLinear(linear))
    torch.manual_seed(0)
    left, right = adapter.loss_factors(x, linear.weight)
    torch.testing.assert_close(left @ right.T, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"init_rank": 33, "targets": ("q_proj",)}, "init_rank=33 is more than the rank of"),
        ({"init_rank": 4, "rank": 5}, "rank=5 is more than adapter.init_rank=4"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        attach(build_tiny(), AdaLoRAConfig(**changes))


# ---- files


def saved(run, folder):
    where = hf_module_name(run.model)
    save_adapter(run.model, folder, module_name=where, base="tiny")
    values = json.loads((folder / "adapter_config.json").read_text())
    return where, values, load_file(folder / "adapter_model.safetensors")


def test_a_file_has_no_pruned_rows_and_names_those_that_are_kept(tmp_path):
    run = Training().steps(TOTAL)
    where, values, tensors = saved(run, tmp_path / "a")
    for name, (_, adapter) in run.adapters.linears.items():
        kept = adapter.keeps.tolist()
        assert values["rank_pattern"][f"{where(name)}.lora_E"] == kept
        stem = f"base_model.model.{where(name)}"
        assert torch.equal(tensors[f"{stem}.lora_A"], adapter.lora_A[kept])
        assert torch.equal(tensors[f"{stem}.lora_E"], adapter.lora_E[kept])
        assert torch.equal(tensors[f"{stem}.lora_B"], adapter.lora_B[:, kept])
    assert (values["tinit"], values["tfinal"], values["total_step"]) == (2, 3, TOTAL)


def test_a_pruned_adapter_loads_equal_and_saves_the_same_file(tmp_path):
    run = Training().steps(TOTAL)
    (_, first), *_ = run.adapters.linears.values()
    with torch.no_grad():  # a linear that is pruned to nothing
        first.keeps.fill_(False)
        first.lora_E.zero_()
    where, values, tensors = saved(run, tmp_path / "a")
    again = build_tiny()
    load_adapter(again, tmp_path / "a", module_name=where)
    expected = run.model.eval().logits(IDS)
    torch.testing.assert_close(again.logits(IDS), expected, atol=1e-5, rtol=1e-5)
    save_adapter(again, tmp_path / "b", module_name=where, base="tiny")
    second = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert second["rank_pattern"] == values["rank_pattern"]
    others = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert all(torch.equal(others[name], tensor) for name, tensor in tensors.items())
    torch.testing.assert_close(merge(again).logits(IDS), expected, atol=2e-5, rtol=1e-5)


def test_an_untrained_adapter_has_a_schedule_that_peft_accepts():
    _, adapters = model_with(CONFIG.model_copy(update={"warmup_steps": 40, "final_steps": None}))
    found = adapters.to_peft({name: name for name in adapters.linears})
    assert found["tinit"] == 40
    assert found["tinit"] < found["total_step"] - found["tfinal"]


def test_a_file_whose_ranks_and_pattern_disagree_is_refused(tmp_path):
    run = Training().steps(TOTAL)
    where, values, _ = saved(run, tmp_path / "a")
    name = next(iter(values["rank_pattern"]))
    values["rank_pattern"][name] = [True] * 4
    values["rank_pattern"] |= {n: [True] * 4 for n in values["rank_pattern"]}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="in the adapter's file and 4 in its rank_pattern"):
        load_adapter(build_tiny(), tmp_path / "a", module_name=where)


def test_a_run_that_ends_early_is_pruned_to_its_budget():
    _, adapters = model_with("adalora")
    before = sum(int(a.keeps.sum()) for _, a in adapters.linears.values())
    adapters.after_step(StepInfo(step=1, total_steps=100))
    assert adapters.finish()
    kept = [int(a.keeps.sum()) for _, a in adapters.linears.values()]
    assert sum(kept) == 2 * len(kept) < before
    assert not adapters.finish()
    for _, adapter in adapters.linears.values():
        assert not bool(adapter.lora_E[~adapter.keeps].any())


def test_a_recipe_cannot_say_which_triplets_are_kept():
    with pytest.raises(ConfigError, match="leave it out"):
        attach(build_tiny(), AdaLoRAConfig(kept={"layers.0.mixer.q_proj": (True,)}))
