"""A budget of reasoning tokens: the closing mark is forced when it is used up."""

import pytest
import torch

from chat_conversations import with_template
from chat_templates import QWEN3
from easyllm.core.errors import ConfigError
from easyllm.engine.reasoning_budget import ReasoningBudget
from easyllm.tokenizer.reasoning import ReasoningFormat
from masks import RuleMask, packed


def ids_of(words):
    """Returns the ids that a mask allows; None for all."""
    if words is None:
        return None
    bits = (words[:, None] >> torch.arange(32)) & 1
    return bits.flatten().nonzero().flatten().tolist()


@pytest.fixture(params=["token", "text"])
def tokenizer(request, tiny_tokenizer):
    marks = ("<think>", "</think>") if request.param == "token" else ()
    return with_template(tiny_tokenizer, QWEN3, *marks)


def budget(tokenizer, count, **options):
    return ReasoningBudget(count, tokenizer.reasoning, tokenizer, **options)


def run(source, ids):
    """Returns what the mask allows before each id, and after the last one."""
    mask, found = source.start(), []
    for token in ids:
        found.append(ids_of(mask.mask()))
        mask.advance(token)
    return [*found, ids_of(mask.mask())]


def encode(tokenizer, text):
    return tokenizer.encode(text, special_tokens=False)


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("starts", [False, True])
def test_the_closing_mark_is_forced_after_the_budget(tokenizer, count, starts):
    opening = [] if starts else encode(tokenizer, "\n<think>")
    close = encode(tokenizer, "</think>")
    thoughts = encode(tokenizer, "a" * count)[:count]
    source = budget(tokenizer, count, starts_in_reasoning=starts)
    answer = encode(tokenizer, "four") * 9
    found = run(source, [*opening, *thoughts, *close, *answer])
    free = len(opening) + len(thoughts)
    assert found[:free] == [None] * free
    assert found[free : free + len(close)] == [[token] for token in close]
    assert found[free + len(close) :] == [None] * (len(answer) + 1)


def test_reasoning_that_closes_itself_is_left_alone(tokenizer):
    ids = encode(tokenizer, "<think>a</think>") + encode(tokenizer, "b") * 20
    assert run(budget(tokenizer, 12), ids) == [None] * (len(ids) + 1)


def test_answers_without_reasoning_are_left_alone(tokenizer):
    ids = encode(tokenizer, "a <think>") * 20
    assert run(budget(tokenizer, 1), ids) == [None] * (len(ids) + 1)


def test_each_completion_has_its_own_count(tokenizer):
    source = budget(tokenizer, 1, starts_in_reasoning=True)
    first, second = source.start(), source.start()
    first.advance(5)
    assert first.mask() is not None
    assert second.mask() is None


def test_an_inner_mask_is_followed_and_told_everything(tokenizer):
    close, seen = encode(tokenizer, "</think>"), []

    def rule(output):
        seen[:] = output
        return packed([7, 8, *close], 384)

    source = budget(tokenizer, 2, starts_in_reasoning=True, inner=RuleMask(rule))
    found = run(source, [7, 8, *close, 7])
    allowed = sorted({7, 8, *close})
    assert found == [allowed, allowed, *([token] for token in close), allowed, allowed]
    assert seen == [7, 8, *close, 7]


def test_the_mark_waits_until_the_inner_mask_allows_it(tokenizer):
    close = encode(tokenizer, "</think>")
    inner = RuleMask(lambda output: packed([9] if len(output) == 1 else [7, *close], 384))
    source = budget(tokenizer, 1, starts_in_reasoning=True, inner=inner)
    found = run(source, [7, 9, *close])
    assert found[1] == [9]
    assert found[2] == [close[0]]


@pytest.mark.parametrize("token", [0, 31, 32, 63, 319])
def test_masks_allow_a_single_token(tiny_tokenizer, token):
    reasoning = ReasoningFormat(open="<a>", close="</a>", ids={"</a>": token})
    source = ReasoningBudget(0, reasoning, tiny_tokenizer, starts_in_reasoning=True)
    words = source.start().mask()
    assert words.dtype == torch.int32
    assert torch.equal(words, packed([token])[: len(words)])


def test_a_negative_budget_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="-1 tokens"):
        budget(tokenizer, -1)
