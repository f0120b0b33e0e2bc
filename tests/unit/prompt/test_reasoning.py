"""Methods of reasoning, with an asker whose replies are known."""

import pytest

from easyllm.core.errors import ConfigError
from easyllm.engine import LLM
from easyllm.prompt.ask import Ask, ModelAsker, Reply
from easyllm.prompt.reasoning import Example, reason, select_examples, subquestions, vote


class Scripted:
    """Replies by what occurs in a prompt; keeps the prompts."""

    def __init__(self, **replies):
        self.replies, self.seen = replies, []

    def __call__(self, asks, *, n=1, temperature=0.0):
        found = []
        for ask in asks:
            self.seen.append(ask)
            text = f"{ask.question}{ask.begun}"
            key = next(k for k in self.replies if k.replace("_", " ") in text)
            given = self.replies[key]
            given = given if isinstance(given, list) else [given] * n
            found.append([Reply(each, 5) for each in given[:n]])
        return found


def test_zero_shot_thinks_first_and_answers_after_its_thoughts():
    ask = Scripted(Therefore=" 12.", step_by_step=" 3 boxes of 4 pens, 99 no.")
    (found,) = reason(ask, ["How many pens?"], "zero-shot")
    assert (found.answer, found.tokens, found.agreement) == ("12", 10, None)
    assert ask.seen[1].begun.endswith("99 no.\nTherefore, the answer is")


def test_few_shot_shows_examples_with_their_steps():
    ask = Scripted(Q=" 3*5=15. The answer is 15.")
    examples = [Example("What is 2*4?", "2*4=8.", "8")]
    (found,) = reason(ask, ["What is 3*5?"], "few-shot", examples=examples)
    assert found.answer == "15"
    expected = "Q: What is 2*4?\nA: 2*4=8. The answer is 8.\n\nQ: What is 3*5?\nA:"
    assert ask.seen[0].question == expected


def test_the_vote_counts_equal_numbers_and_leaves_out_what_has_no_answer():
    replies = ["The answer is 7", "The answer is 1,000", "no idea", "so 1000.0", "it is 7.0", "7"]
    (found,) = reason(Scripted(q=replies), ["q"], "direct", samples=6)
    assert (found.answer, found.agreement, found.unparsed) == ("7", 3 / 5, 1)
    assert found.votes == {"7": 3, "1000.0": 2}
    assert vote([("x", None, 3, True)]).answer is None


def test_least_to_most_answers_the_parts_in_order():
    ask = Scripted(
        **{
            "Divide": "1. How many boxes?\n2. How many pens in all?",
            "Question:_How_many_boxes": "3",
            "Question:_problem": "3 * 4 = 12. The answer is 12",
        }
    )
    ask.replies = dict(reversed(ask.replies.items()))  # the last part comes first in a search
    (found,) = reason(ask, ["problem"], "least-to-most")
    assert found.answer == "12"
    assert found.tokens == 15
    assert "Question: How many boxes?\n3\n" in ask.seen[-1].question
    assert subquestions("1. a\n2. b\n3. c") == ["a", "b"]


def test_the_tree_keeps_the_best_valued_steps():
    ask = Scripted(
        **{
            "1._good\nRate": "9",
            "1._bad\nRate": "2",
            "2._The_answer_is_24\nRate": "10",
            "1._good\nWrite": ["The answer is 24", "The answer is 24"],
            "1._bad\nWrite": ["The answer is 5", "The answer is 6"],
            "Rate": "1",
            "Write": ["bad", "good"],
        }
    )
    (found,) = reason(ask, ["game"], "tree", breadth=1, depth=3)
    assert found.text == "bad\nThe answer is 5"
    (found,) = reason(ask, ["game"], "tree", breadth=2, depth=2)
    assert found.text == "good\nThe answer is 24"


def test_examples_are_selected_while_they_raise_the_metric():
    pool = [Example(name, "", "1") for name in "abcd"]
    gains = {"a": 0.1, "b": 0.3, "c": 0.0, "d": -0.2}
    chosen, history = select_examples(
        pool, lambda some: sum(gains[e.question] for e in some), count=4
    )
    assert [e.question for e in chosen] == ["b", "a"]
    assert history == pytest.approx([0, 0.3, 0.4])


def test_options_that_do_not_fit_are_refused():
    for options, message in (
        ({"method": "few-shot"}, "needs examples"),
        ({"method": "tree", "samples": 2}, "independent replies"),
        ({"method": "direct", "examples": [Example("a", "", "b")]}, "reads no examples"),
    ):
        with pytest.raises(ConfigError, match=message):
            reason(Scripted(), ["q"], **options)


def test_replies_of_a_model_are_reproducible_and_counted(tiny_model, tiny_tokenizer):
    llm = LLM(model=tiny_model, tokenizer=tiny_tokenizer)
    asks = [Ask("the fox", "so "), Ask("a dog")]
    one, two = (ModelAsker(llm, max_tokens=4, seed=s) for s in (1, 1))
    first = one(asks, n=3, temperature=1.0)
    assert first == two(asks[::-1], n=3, temperature=1.0)[::-1]
    assert one.tokens == sum(r.tokens for group in first for r in group)
    assert one.asked == 6
    assert len({reply.text for reply in first[0]}) > 1
    assert first[0][:2] == one(asks, n=2, temperature=1.0)[0]
    with pytest.raises(ConfigError, match="would all be equal"):
        one(asks, n=2)
    text = llm.tokenizer.decode(list(one.encode(asks[0])), skip_special=False)
    assert text.endswith("assistant\nso")
    plain = ModelAsker(llm, chat=False, system="S")
    assert llm.tokenizer.decode(list(plain.encode(asks[1]))) == "S\n\nQ: a dog\nA:"
