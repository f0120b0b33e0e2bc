"""Rollouts: seeds repeat them, they follow the weights, and LoRA decodes in the compiled step."""

import pytest
import torch

from easyllm.adapters import attach
from easyllm.adapters.lora import LoRAConfig
from easyllm.ops.kernels.build import _library
from easyllm.rl.prompts import PromptSample
from easyllm.rl.rollout import RolloutConfig, Sampler, prompt_seed
from tiny_models import build_tiny

PROMPTS = [PromptSample(ids, (-100,) * len(ids)) for ids in ((5, 6, 7), tuple(range(40, 60)))]
SEEDS = [prompt_seed(0, 3, n) for n in range(2)]


def sampler(tokenizer, model=None, **options):
    values = {"group_size": 3, "max_tokens": 5} | options
    config = RolloutConfig.model_validate(values)
    return Sampler(model or build_tiny(seed=1), tokenizer, config, longest=64)


def test_the_same_seeds_give_the_same_answers_and_others_do_not(tiny_tokenizer):
    roll = sampler(tiny_tokenizer)
    first = roll(PROMPTS, SEEDS)
    assert [len(group) for group in first] == [3, 3]
    assert roll(PROMPTS, SEEDS) == first
    (alone,) = roll(PROMPTS[1:], SEEDS[1:])  # whatever else is sampled
    assert [a.token_ids for a in alone] == [a.token_ids for a in first[1]]
    for one, other in zip(alone, first[1], strict=True):
        # sums depend on the rows of a product on some processors
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert roll(PROMPTS, [s + 1 for s in SEEDS]) != first
    assert len({answer.token_ids for answer in first[0]}) > 1


def test_answers_have_the_log_probabilities_of_the_changed_weights(tiny_tokenizer):
    model = build_tiny(seed=1)
    roll = sampler(tiny_tokenizer, model, temperature=0.7)
    before = roll(PROMPTS, SEEDS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.7)
    after = roll(PROMPTS, SEEDS)
    assert after != before
    for prompt, group in zip(PROMPTS, after, strict=True):
        for answer in group:
            ids = [*prompt.token_ids, *answer.token_ids]
            logits = model.logits(ids[:-1])[len(prompt.token_ids) - 1 :] / 0.7
            found = logits.log_softmax(-1).gather(1, torch.tensor(answer.token_ids)[:, None])
            assert list(answer.logprobs) == pytest.approx(found.squeeze(1).tolist(), abs=1e-4)


@pytest.mark.skipif(_library() is None, reason="there is no C compiler")
@pytest.mark.parametrize("lora", [False, True])
def test_a_model_in_training_decodes_in_the_compiled_step(lora, tiny_tokenizer):
    model = build_tiny(seed=1)
    if lora:
        attach(model, LoRAConfig(rank=4))
    model.train()
    roll = sampler(tiny_tokenizer, model)
    roll(PROMPTS, SEEDS)
    assert roll.fast_step == "CompiledStep"
    assert model.training  # restored
    held = {id(p) for p in model.parameters()}
    roll(PROMPTS, SEEDS)
    assert {id(p) for p in model.parameters()} == held  # the optimizer's parameters


def test_greedy_answers_are_one_per_prompt(tiny_tokenizer):
    found = sampler(tiny_tokenizer)(PROMPTS, [0, 0], greedy=True)
    assert [len(group) for group in found] == [1, 1]


def test_an_answer_that_stops_is_not_truncated(tiny_tokenizer):
    found = sampler(tiny_tokenizer, max_tokens=20, stop=["e", "a", "o", " "])(PROMPTS, SEEDS)
    ends = [answer.truncated for group in found for answer in group]
    assert not all(ends)
    for answer in (a for group in found for a in group):
        assert answer.truncated == (len(answer.token_ids) == 20) or not answer.truncated
