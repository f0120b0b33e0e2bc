"""Metrics against sacrebleu and rouge-score, and their bootstrap against textbook errors."""

import random

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from easyllm.evaluate.likelihood_metrics import likelihood_metrics
from easyllm.evaluate.metric import Outcome, mean_metric, paired_difference, score, table
from easyllm.evaluate.text_metrics import (
    ROUGE,
    MixedTokenizer,
    bleu_details,
    modified_precision,
    text_metrics,
)

ENGLISH = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "on",
    "mat",
    "In",
    "Paris",
    "3.5",
    "ran.",
    "quickly,",
    "over",
    "-5",
    "hill's",
    "e-mail",
    "U.S.",
    "it",
]
CHINESE = [*"今天北京的天气很好，我们去公园看花。他说：第二名！是吗？；", "GPT", "2024"]


def pairs(words, joint, count=24, seed=3):
    """Answers that share part of their words with one or two references; one is empty."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        right = [rng.choice(words) for _ in range(rng.randrange(4, 14))]
        other = [word if rng.random() < 0.7 else rng.choice(words) for word in right]
        answer = [word if rng.random() < 0.7 else rng.choice(words) for word in right]
        found.append((joint.join(answer), (joint.join(right), joint.join(other))))
    return [*found, ("", ("a reference",))]


def outcomes(found, references):
    return [Outcome(answer=a or None, references=r[:references]) for a, r in found]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_bleu_and_chrf_equal_sacrebleu(language):
    found = pairs(ENGLISH, " ") if language == "en" else pairs(CHINESE, "")
    metrics = text_metrics(language)
    answers = [answer for answer, _ in found]
    streams = [[right[0] for _, right in found]]
    tokenize = "13a" if language == "en" else "zh"
    bleu = sacrebleu.corpus_bleu(answers, streams, tokenize=tokenize)
    chrf = sacrebleu.corpus_chrf(answers, streams)
    ours = {
        name: score(metrics[name], table(metrics[name], outcomes(found, 1)))
        for name in ("bleu", "chrf")
    }
    assert ours["bleu"].value == pytest.approx(bleu.score, abs=1e-9)
    assert ours["chrf"].value == pytest.approx(chrf.score, abs=1e-9)
    assert ours["bleu"].low < bleu.score < ours["bleu"].high
    details = bleu_details(table(metrics["bleu"], outcomes(found, 1)), language)
    assert details["precisions"] == pytest.approx(bleu.precisions, abs=1e-3)


def test_bleu_of_two_references_equals_sacrebleu():
    found = pairs(ENGLISH, " ")[:-1]
    answers = [answer for answer, _ in found]
    streams = [[right[i] for _, right in found] for i in range(2)]
    for name, function in (("bleu", sacrebleu.corpus_bleu), ("chrf", sacrebleu.corpus_chrf)):
        metric = text_metrics()[name]
        ours = score(metric, table(metric, outcomes(found, 2)))
        assert ours.value == pytest.approx(function(answers, streams).score, abs=1e-9)


def test_counts_are_clipped():
    references = ["the cat is on the mat", "there is a cat on the mat"]
    assert modified_precision("the the the the the the the", references, 1) == (2, 7)


def test_english_rouge_equals_rouge_score():
    found = [*pairs(ENGLISH, " "), ("One two.\nThree four", ("One.\nFour three two",))]
    scorer = RougeScorer(list(ROUGE))
    for name in ROUGE:
        expected = np.mean([scorer.score(r[0], a)[name].fmeasure for a, r in found])
        metric = text_metrics()[name]
        assert score(metric, table(metric, outcomes(found, 1))).value == pytest.approx(expected)


def test_chinese_rouge_equals_that_of_spaced_and_renamed_characters():
    """rouge-score drops Han characters, so each is renamed to a Latin word for it."""
    found = pairs(CHINESE, "")
    scorer = RougeScorer(list(ROUGE))

    def renamed(text, lines):
        ends = "。！？；!?" if lines else ""
        text = "".join(f"{c}\n" if c in ends else c for c in text)
        return "".join(f" u{ord(c):x} " if "\u4e00" <= c <= "\u9fff" else c for c in text)

    for name in ROUGE:
        lines = name == "rougeLsum"
        expected = np.mean(
            [scorer.score(renamed(r[0], lines), renamed(a, lines))[name].fmeasure for a, r in found]
        )
        metric = text_metrics("zh")[name]
        assert score(metric, table(metric, outcomes(found, 1))).value == pytest.approx(expected)
        assert expected > 0.1


def test_chinese_text_is_segmented_into_words_on_request():
    tokens = MixedTokenizer(words=True).tokenize("我们在北京大学学习 GPT-2 模型。")
    assert "北京大学" in tokens
    assert tokens[-2:] == ["2", "模型"]
    assert MixedTokenizer().tokenize("北京 2024!") == ["北", "京", "2024"]


def test_a_repeated_word_is_not_counted_twice_in_rouge():
    metric = text_metrics("zh")["rouge1"]
    looping = Outcome(answer="好" * 8, references=("好天气真不错啊",))
    assert metric.statistics(looping)[0] == pytest.approx(2 / 15)


def test_the_error_of_a_mean_is_exact_and_its_interval_covers():
    values = np.random.default_rng(0).random(200) < 0.3
    metric = mean_metric("m", "text", lambda outcome: float(outcome.passed))
    found = score(metric, table(metric, [Outcome(passed=bool(v)) for v in values]))
    assert found.standard_error == pytest.approx(values.std(ddof=1) / np.sqrt(200))
    assert found.high - found.low == pytest.approx(3.92 * found.standard_error, rel=0.1)
    assert score(metric, table(metric, [Outcome(passed=True)])).standard_error is None


def test_a_paired_test_finds_a_difference_that_separate_intervals_hide():
    rng = np.random.default_rng(1)
    first = rng.random(300) < 0.5
    second = first | (rng.random(300) < 0.06)
    metric = mean_metric("m", "text", lambda outcome: float(outcome.passed))
    one, two = (table(metric, [Outcome(passed=bool(v)) for v in each]) for each in (first, second))
    found = paired_difference(metric, one, two)
    better = int((second & ~first).sum())
    assert found["p_value"] == pytest.approx(2 * 0.5**better, abs=0.006)  # the sign test's
    assert found["p_value"] < 0.05
    assert found["low"] > 0
    assert (found["first_better"], found["second_better"]) == (0, better)
    assert score(metric, one).high > score(metric, two).low
    same = paired_difference(metric, one, one)
    assert (same["difference"], same["p_value"]) == (0, 1)


def test_calibration_error_of_hand_made_bins():
    metric = likelihood_metrics()["ece"]

    def item(p, right):
        return Outcome(likelihoods=(float(np.log(p)), float(np.log(1 - p))), gold=int(not right))

    # .85: right half of the time; .65: always right
    found = [item(0.85, True), item(0.85, False), item(0.65, True), item(0.65, True)]
    assert score(metric, table(metric, found)).value == pytest.approx(0.35)


def test_accuracies_divide_by_characters_and_bytes():
    metrics = likelihood_metrics()
    item = Outcome(likelihoods=(-6.0, -7.0), choices=("abcd", "北京大学生"), gold=1)
    found = {n: metrics[n].statistics(item)[0] for n in ("accuracy", "accuracy_norm")}
    assert found == {"accuracy": 0, "accuracy_norm": 1}
    assert metrics["accuracy_bytes"].statistics(item)[0] == 1
    other = Outcome(likelihoods=(-1.0, -2.2), choices=("a", "北京"), gold=1)
    assert metrics["accuracy_norm"].statistics(other)[0] == 0
    assert metrics["accuracy_bytes"].statistics(other)[0] == 1
