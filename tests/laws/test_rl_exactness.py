"""Law 6 in training: rollout log-probabilities are the trainer's, and the first ratio is 1."""

import json

import pytest
import torch

from easyllm.batches.packing import pack
from easyllm.examples.sample import Sample
from easyllm.ops.kernels.build import _library
from easyllm.rl.experience import Experience, from_json, to_json, with_groups
from easyllm.rl.prompts import PromptSample
from easyllm.rl.rollout import RolledOut
from easyllm.train import train
from rl_runs import metrics_of, rl_config
from tiny_models import build_tiny

LORA = {"kind": "lora", "rank": 4}
EXACT = {"deterministic": True, "max_tokens": 6, "group_size": 4}


@pytest.mark.skipif(_library() is None, reason="there is no C compiler")
@pytest.mark.parametrize(
    ("sampling", "updates"),
    [({}, 1), ({"temperature": 0.7}, 1), ({"top_p": 0.8}, 1), ({}, 2)],
    ids=["plain", "temperature", "top-p", "two-updates"],
)
@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_in_deterministic_mode_the_mismatch_is_zero_and_the_first_ratio_one(
    sampling, updates, adapter, tiny_folder, tmp_path
):
    rollout = {"rollout": EXACT | sampling | {"epochs": updates}}
    train(rl_config(tmp_path, tiny_folder, rollout, adapter=adapter), tmp_path / "run")
    lines = metrics_of(tmp_path / "run")
    assert [line["rl/mismatch_nats"] for line in lines] == [0.0] * 4
    first = [line for number, line in enumerate(lines) if number % updates == 0]
    assert [line["rl/update_kl_nats"] for line in first] == [0.0] * len(first)
    assert [line["rl/clip_fraction"] for line in first] == [0.0] * len(first)
    if updates == 2:  # the control: the second update's ratio is no longer 1
        assert all(line["rl/update_kl_nats"] > 0 for line in lines[1::2])


def test_top_p_that_is_not_renormalised_is_a_mismatch(tiny_folder, tmp_path):
    rollout = {"rollout": EXACT | {"top_p": 0.8, "renormalise": False}}
    train(rl_config(tmp_path, tiny_folder, rollout, max_steps=1), tmp_path / "run")
    assert metrics_of(tmp_path / "run")[0]["rl/mismatch_nats"] > 0.01


def experience(prompt, answer, value, **changes):
    sample = PromptSample(tuple(prompt), (-100,) * len(prompt))
    rolled = RolledOut(tuple(answer), (-1.0,) * len(answer), "", truncated=False)
    tokens = {"advantages": torch.full((len(answer),), value)}
    return Experience(sample, rolled, tokens=tokens, **changes)


def test_the_labels_of_an_answer_are_its_tokens_at_the_positions_that_predict_them():
    found = experience([5, 6, 7], [8, 9, 2], 0.5).sample()
    assert found.token_ids == (5, 6, 7, 8, 9)
    assert found.labels == (-100, -100, 8, 9, 2)
    assert found.extras["advantages"] == [0.0, 0.0, 0.5, 0.5, 0.5]
    assert experience([5, 6], [7], 1.0, is_trained=False).sample().num_trained == 0


def test_a_sample_survives_a_checkpoint_bit_for_bit():
    each = experience([5, 6, 7], [8, 9, 2], 0.0)
    each.tokens["advantages"] = torch.rand(3) / 3
    sample = each.sample()
    back = from_json(json.loads(json.dumps(to_json(each)))).sample
    assert torch.equal(pack([back]).extras["advantages"], pack([sample]).extras["advantages"])


@pytest.mark.parametrize("averaging", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("ratio", ["token", "sequence", "clipped_weight"])
def test_packed_answers_have_the_gradients_of_each_alone(averaging, ratio):
    """Law 4 for the policy loss: any split into micro-batches gives the same gradients."""
    from easyllm.rl.config import GRPOConfig
    from easyllm.rl.grpo import GRPO
    from easyllm.train.loop import accumulate

    objective = GRPO(
        GRPOConfig.model_validate(
            {
                "rewards": [{"function": "even_tokens"}],
                "loss": {"averaging": averaging, "ratio": ratio},
                "rollout": {"max_tokens": 8},
            }
        )
    )
    answers = [
        experience(range(5, 5 + n), range(40, 40 + m), value)
        for n, m, value in ((3, 4, 1.0), (6, 1, -0.5), (2, 7, 0.25))
    ]
    for each in answers:
        each.tokens["rollout_logprobs"] = torch.full((each.length,), -3.0)
        each.tokens["old_logprobs"] = torch.full((each.length,), -3.0)
    samples = [each.sample() for each in answers]
    grads = []
    for batches in ([pack(samples)], [pack([each]) for each in samples]):
        model = build_tiny(seed=2).requires_grad_(True)
        accumulate(model, objective, batches)
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)
    assert any(float(g.abs().max()) > 1e-4 for g in grads[0])


def test_a_prompt_that_is_computed_once_gives_the_same_losses_and_gradients():
    from easyllm.rl.config import GRPOConfig
    from easyllm.rl.grpo import GRPO
    from easyllm.train.loop import accumulate

    objective = GRPO(GRPOConfig.model_validate({"rewards": [{"function": "even_tokens"}]}))
    answers = [
        experience(range(5, 5 + n), range(first, first + m), value, group=group)
        for group, n, first, m, value in (
            *((0, 9, 40, 4, 1.0), (0, 9, 60, 1, -0.5), (0, 9, 70, 7, 0.25)),
            *((1, 3, 80, 2, 0.5), (1, 3, 90, 5, -0.75)),
        )
    ]
    for each in answers:
        each.tokens["rollout_logprobs"] = torch.full((each.length,), -3.0)
        each.tokens["old_logprobs"] = torch.full((each.length,), -3.0)
    samples = [each.sample() for each in answers]
    found = []
    for batch in (pack(samples), pack(with_groups(samples, answers))):
        model = build_tiny(seed=2).requires_grad_(True)
        rows = []
        model.layers[0].feed_forward.register_forward_hook(
            lambda _module, inputs, _out, rows=rows: rows.append(len(inputs[0]))
        )
        loss, _ = accumulate(model, objective, [batch])
        found.append((loss, rows, [p.grad for p in model.parameters()]))
    assert found[0][1] == [sum(9 + m - 1 for m in (4, 1, 7)) + (3 + 1) + (3 + 4)]
    assert found[1][1] == [found[0][1][0] - 2 * 9 - 3]
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    for a, b in zip(found[0][2], found[1][2], strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)


def test_the_sample_type_is_that_of_the_trainer():
    assert isinstance(experience([5, 6], [7], 1.0).sample(), Sample)
