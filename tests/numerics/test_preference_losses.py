"""Preference losses and their gradients against the formulas of the papers, in fp64."""

import math

import pytest
import torch

from easyllm.batches.packing import pack
from easyllm.examples.prepare import Encoded
from easyllm.train.loop import accumulate
from easyllm.train.objectives import (
    DPO,
    KTO,
    ORPO,
    DPOConfig,
    KTOConfig,
    ORPOConfig,
    Reference,
    Reward,
    RewardConfig,
    SimPO,
    SimPOConfig,
)
from easyllm.train.objectives.kto import with_mismatched
from easyllm.train.objectives.orpo import log_odds
from preference_rows import random_batch, random_group, random_ids
from tiny_models import build_tiny

SHAPES = ((6, 5, 9), (3, 2, 4), (9, 7, 1))


def policy():
    return build_tiny().double().requires_grad_(True)


def reference():
    return Reference(build_tiny(seed=1).double(), without_adapter=False)


def token_logprobs(model, ids, labels):
    """log p of each label of one sequence, from full logits."""
    from easyllm.nn.context import ForwardContext

    logits = model.head(model(ids, ForwardContext.packed([len(ids)])))
    keep = labels != -100
    return logits.log_softmax(-1)[keep].gather(1, labels[keep][:, None]).squeeze(1)


def each_sequence(model, batch):
    ids, labels = batch.token_ids.split(batch.lengths), batch.labels.split(batch.lengths)
    parts = zip(ids, labels, strict=True)
    return [token_logprobs(model, ids, labels) for ids, labels in parts]


def assert_equals(objective, model, batch, expected):
    """The loop's loss and gradients equal those of a scalar computed from the formula."""
    loss, metrics = accumulate(model, objective, [batch])
    assert loss == pytest.approx(float(expected.detach()), abs=1e-9)
    for name, parameter in model.named_parameters():
        right = torch.autograd.grad(expected, parameter, retain_graph=True)[0]
        torch.testing.assert_close(parameter.grad, right, atol=1e-9, rtol=1e-7, msg=name)
    return metrics


def log_sigmoid(x):
    return -torch.log1p(torch.exp(-x))


BETA, EPS = 0.3, 0.2
DPO_FORMULAS = {
    "sigmoid": lambda h, _: -log_sigmoid(BETA * h),
    "cdpo": lambda h, _: -(1 - EPS) * log_sigmoid(BETA * h) - EPS * log_sigmoid(-BETA * h),
    "robust": lambda h, _: (
        -((1 - EPS) * log_sigmoid(BETA * h) - EPS * log_sigmoid(-BETA * h)) / (1 - 2 * EPS)
    ),
    "hinge": lambda h, _: torch.clamp(1 - BETA * h, min=0),
    "ipo": lambda _, mean: (mean - 1 / (2 * BETA)) ** 2,
}


@pytest.mark.parametrize("variant", DPO_FORMULAS)
def test_dpo_variants(variant):
    loss = "sigmoid" if variant == "cdpo" else variant
    smoothing = EPS if variant in ("cdpo", "robust") else 0.0
    objective = DPO(DPOConfig(beta=BETA, loss=loss, label_smoothing=smoothing))
    objective.reference, model, batch = reference(), policy(), random_batch(*SHAPES)
    ours = each_sequence(model, batch)
    with torch.no_grad():
        theirs = each_sequence(objective.reference.model, batch)
    sums = [a.sum() - b.sum() for a, b in zip(ours, theirs, strict=True)]
    means = [a.mean() - b.mean() for a, b in zip(ours, theirs, strict=True)]
    losses = [
        DPO_FORMULAS[variant](sums[i] - sums[i + 1], means[i] - means[i + 1]) for i in (0, 2, 4)
    ]
    metrics = assert_equals(objective, model, batch, sum(losses) / 3)
    margins = [BETA * float((sums[i] - sums[i + 1]).detach()) for i in (0, 2, 4)]
    assert metrics["reward_margin"] == pytest.approx(sum(margins) / 3, rel=1e-5)
    assert metrics["reward_accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 3)
    rewards = [BETA * float(sums[i].detach()) for i in (0, 2, 4)]
    assert metrics["rewards/chosen"] == pytest.approx(sum(rewards) / 3, rel=1e-5)
    logprobs = [float(ours[i].detach().sum()) for i in (1, 3, 5)]
    assert metrics["logprobs/rejected"] == pytest.approx(sum(logprobs) / 3, rel=1e-5)


def test_a_ranking_is_the_mean_of_its_pairs():
    objective, model = DPO(DPOConfig(beta=BETA)), policy()
    objective.reference, batch = reference(), random_batch((6, 5, 9, 3), (3, 2, 4))
    ours = each_sequence(model, batch)
    with torch.no_grad():
        theirs = each_sequence(objective.reference.model, batch)
    d = [a.sum() - b.sum() for a, b in zip(ours, theirs, strict=True)]
    first = sum(-log_sigmoid(BETA * (d[i] - d[j])) for i, j in ((0, 1), (0, 2), (1, 2))) / 3
    second = -log_sigmoid(BETA * (d[3] - d[4]))
    assert objective.num_terms(batch) == 2
    assert_equals(objective, model, batch, (first + second) / 2)


def test_simpo():
    model, batch = policy(), random_batch(*SHAPES)
    means = [part.mean() for part in each_sequence(model, batch)]
    losses = [-log_sigmoid(2.5 * (means[i] - means[i + 1]) - 0.75) for i in (0, 2, 4)]
    objective = SimPO(SimPOConfig(beta=2.5, gamma=0.75))
    assert_equals(objective, model, batch, sum(losses) / 3)


def test_orpo():
    model, batch = policy(), random_batch(*SHAPES)
    p = [part.mean().exp() for part in each_sequence(model, batch)]
    odds = [x / (1 - x) for x in p]
    losses = [-p[i].log() - 0.4 * log_sigmoid((odds[i] / odds[i + 1]).log()) for i in (0, 2, 4)]
    assert_equals(ORPO(ORPOConfig(beta=0.4)), model, batch, sum(losses) / 3)


@pytest.mark.parametrize("p", [1e-30, 0.1, 0.5, 0.9, 1 - 1e-5])
def test_log_odds_are_stable(p):
    x = torch.tensor(math.log(p), dtype=torch.float64, requires_grad=True)
    found = log_odds(x)
    assert float(found.detach()) == pytest.approx(math.log(p) - math.log1p(-p), rel=1e-6)
    found.backward()
    assert float(x.grad) == pytest.approx(1 / (1 - p), rel=1e-6)


def test_log_odds_of_one_are_finite():
    x = torch.zeros(1, requires_grad=True)
    log_odds(x).sum().backward()
    assert torch.isfinite(log_odds(x)).all()
    assert torch.isfinite(x.grad).all()


def labelled_rows():
    generator = torch.Generator().manual_seed(2)
    rows = []
    for prompt, length, good in ((5, 6, True), (3, 8, False), (4, 2, True)):
        ids = random_ids(prompt + length, generator)
        rows.append((Encoded("row", ids, [False] * prompt + [True] * length), good))
    return rows


@pytest.mark.parametrize("estimate", ["negative", "positive"])
def test_kto_with_the_divergence_of_mismatched_responses(estimate):
    """A negative estimate of a divergence is clamped to 0."""
    config = KTOConfig(beta=BETA, desirable_weight=1.5, undesirable_weight=0.7)
    objective, model = KTO(config), policy()
    objective.reference = reference()
    rows = labelled_rows()
    batch = pack(with_mismatched(rows, max_seq_len=64))
    if estimate == "positive":
        objective.reference, model = Reference(model, without_adapter=False), build_tiny(seed=1)
        model = model.double().requires_grad_(True)
    prompts, responses = [5, 3, 4], [list(e.token_ids) for e, _ in rows]

    def ratio(number, other, keep_grad):
        start = prompts[number]
        ids = responses[number][:start] + responses[other][prompts[other] :]
        labels = torch.tensor([-100] * (start - 1) + ids[start:])
        ids = torch.tensor(ids[:-1])
        with torch.no_grad():
            theirs = token_logprobs(objective.reference.model, ids, labels).sum()
        with torch.set_grad_enabled(keep_grad):
            return token_logprobs(model, ids, labels).sum() - theirs

    kl = sum(float(ratio(i, (i + 1) % 3, False)) for i in range(3)) / 3
    assert (kl > 0) == (estimate == "positive")
    kl = max(0.0, kl)
    d = [ratio(i, i, True) for i in range(3)]
    good = [1.5 * (1 - torch.sigmoid(BETA * (x - kl))) for x in (d[0], d[2])]
    bad = 0.7 * (1 - torch.sigmoid(BETA * (kl - d[1])))
    metrics = assert_equals(objective, model, batch, (sum(good) + bad) / 3)
    assert metrics["kl_nats"] == pytest.approx(kl)
    chosen = BETA * float((d[0] + d[2]).detach()) / 2
    assert metrics["rewards/chosen"] == pytest.approx(chosen, rel=1e-6)
    assert metrics["rewards/rejected"] == pytest.approx(BETA * float(d[1].detach()), rel=1e-6)


def test_kto_does_not_depend_on_how_a_step_is_split():
    objective, model = KTO(KTOConfig(beta=BETA)), policy()
    objective.reference = reference()
    samples = with_mismatched(labelled_rows(), max_seq_len=64)
    found = []
    for batches in ([pack(samples)], [pack([sample]) for sample in samples]):
        model.zero_grad(set_to_none=True)
        loss, metrics = accumulate(model, objective, batches)
        found.append((loss, metrics, [p.grad.clone() for p in model.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0])
    assert found[0][1] == pytest.approx(found[1][1])
    for a, b in zip(found[0][2], found[1][2], strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)
    evaluated = objective.evaluate(model, [pack([sample]) for sample in samples])
    assert evaluated["loss_nats"] == pytest.approx(found[0][0])


@pytest.mark.parametrize("center", [0.0, 0.25])
def test_reward_of_pairs_with_margins(center):
    objective = Reward(RewardConfig(center=center))
    model = objective.prepare_model(build_tiny().double(), seed=0).requires_grad_(True)
    groups = [random_group(*shape, seed=i, whole=True) for i, shape in enumerate(SHAPES)]
    groups[1].parts[0].extras["margin"] = groups[1].parts[1].extras["margin"] = 0.5
    batch = pack(groups)
    from easyllm.nn.context import ForwardContext

    r = [
        model.head(model(ids, ForwardContext.packed([len(ids)])))[-1, 0]
        for ids in batch.token_ids.split(batch.lengths)
    ]
    losses = [
        -log_sigmoid(r[i] - r[i + 1] - margin) + center * (r[i] + r[i + 1]) ** 2
        for i, margin in ((0, 0.0), (2, 0.5), (4, 0.0))
    ]
    metrics = assert_equals(objective, model, batch, sum(losses) / 3)
    assert metrics["rewards/chosen"] == pytest.approx(float((r[0] + r[2] + r[4]).detach()) / 3)
