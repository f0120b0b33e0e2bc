"""Decontamination finds runs of 13 common words in any spelling, and nothing shorter."""

import pickle
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from easyllm.core.config import validate
from easyllm.core.errors import ConfigError
from easyllm.corpus.decontaminate import DecontaminationConfig, Decontaminator
from easyllm.corpus.document import Document

QUESTION = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many "
    "clips in May. "
    "How many clips did Natalia sell altogether in April and May?"
)
CHINESE = (
    "商店原有三百二十支铅笔，上午卖出一百一十五支，下午又进货八十支，请问商店现在一共有多少支铅笔？"
)
SHORT = "Which planet of the solar system is the largest?"
FILLER = [f"filler{i}" for i in range(40)]


def document(text):
    return Document(id="1", source="web", text=text)


@pytest.fixture(scope="module")
def decontaminator():
    return Decontaminator.from_texts({"gsm": [QUESTION, "Why?"], "other": [CHINESE, SHORT]})


def planted(piece):
    return document(" ".join([*FILLER, piece, *FILLER]))


def test_a_document_with_thirteen_words_of_a_question_is_rejected(decontaminator):
    run = " ".join(QUESTION.split()[3:16])
    rejected = decontaminator.check(planted(run))
    assert rejected.rule == "decontamination:gsm"
    assert rejected.value == run.rstrip(",")
    assert rejected.document == planted(run)
    assert decontaminator.check(planted(" ".join(QUESTION.split()[3:15]))) is None


def test_case_punctuation_and_space_do_not_hide_it(decontaminator):
    written = "  *".join(QUESTION.upper().replace(",", " --").split()[:20])
    rejected = decontaminator.check(planted(written))
    assert rejected.value.startswith("NATALIA  *SOLD")
    assert rejected.value in written


def test_one_changed_word_in_every_twelve_avoids_detection(decontaminator):
    changed = QUESTION.split()
    changed[5::10] = ["other"] * len(changed[5::10])
    assert decontaminator.check(document(" ".join(changed))) is None


def test_chinese_runs_are_twenty_characters(decontaminator):
    characters = CHINESE.replace("，", "").replace("？", "")
    rejected = decontaminator.check(document(f"题目{characters[5:25]}。完"))
    assert (rejected.rule, rejected.value) == ("decontamination:other", characters[5:25])
    assert decontaminator.check(document(f"题目{characters[5:24]}。完")) is None
    spaced = " ".join(characters)
    assert decontaminator.check(document(spaced)).value == spaced[: 2 * 20 - 1]


def test_a_short_evaluation_text_must_match_completely(decontaminator):
    rejected = decontaminator.check(planted(SHORT.lower()))
    assert rejected.value == SHORT.lower().rstrip("?")
    assert decontaminator.check(planted(" ".join(SHORT.split()[:-1]))) is None


def test_evaluation_texts_that_are_too_short_are_counted(decontaminator):
    assert decontaminator.num_passed_over == {"gsm": 1, "other": 0}
    chinese = Decontaminator.from_texts(
        {"zh": ["一二三四五六七八九十一", "一二三四五六七八九十一二"]}
    )
    assert chinese.num_passed_over == {"zh": 1}
    assert list(chinese.runs) == [12]


def test_documents_without_words_and_sets_without_texts_are_clean(decontaminator):
    for text in ("", "?!", "one two"):
        assert decontaminator.check(document(text)) is None
    empty = Decontaminator.from_texts({"nothing": []})
    assert empty.check(document(QUESTION)) is None


def test_a_decontaminator_can_be_sent_to_other_processes(decontaminator):
    copy = pickle.loads(pickle.dumps(decontaminator))
    assert copy.check(document(QUESTION)) == decontaminator.check(document(QUESTION))
    assert copy.check(document(" ".join(FILLER))) is None


def test_sizes_are_configurable():
    config = validate(DecontaminationConfig, {"ngram_size": 5, "min_words": 3}, source="r")
    found = Decontaminator.from_texts({"e": [QUESTION]}, config)
    assert found.check(planted("of her friends in April")).value == "of her friends in April"
    assert found.check(planted("of her friends in")) is None
    with pytest.raises(ConfigError, match="set min_words to 5 or less"):
        validate(DecontaminationConfig, {"ngram_size": 5}, source="r")


@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=150)
def test_verdicts_match_a_naive_implementation(seed):
    random_ = random.Random(seed)
    config = DecontaminationConfig(ngram_size=4, min_words=2)

    def text():
        return [random_.choice("abc") for _ in range(random_.randrange(12))]

    evaluation, subject = [text() for _ in range(3)], text()
    runs = {
        tuple(t[i : i + min(4, len(t))])
        for t in evaluation
        if len(t) >= 2
        for i in range(len(t) - min(4, len(t)) + 1)
    }
    expected = any(
        tuple(subject[i : i + size]) in runs for size in (2, 3, 4) for i in range(len(subject))
    )
    found = Decontaminator.from_texts({"e": [" ".join(t) for t in evaluation]}, config)
    rejected = found.check(document(" ".join(subject)))
    assert (rejected is not None) == expected
    if rejected is not None:
        assert tuple(rejected.value.split()) in runs
