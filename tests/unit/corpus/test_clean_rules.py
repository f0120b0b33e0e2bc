"""Cleaning rules: published limits of Gopher, C4 and FineWeb, languages, lengths."""

import itertools

import pytest

from clean_documents import CHINESE, ENGLISH, document, outcome
from easyllm.core.config import validate
from easyllm.core.errors import ConfigError
from easyllm.corpus.clean import (
    PRESETS,
    C4Quality,
    CleanConfig,
    Cleaner,
    DocumentLength,
    FineWebQuality,
    GopherQuality,
    GopherRepetition,
    HanShare,
    LanguageIdentification,
    TextView,
    Violation,
    identify_language,
)
from easyllm.corpus.clean.c4 import count_sentences
from easyllm.corpus.clean.language import LANGUAGES
from easyllm.corpus.clean.ngrams import NgramStatistics
from easyllm.corpus.clean.violation import Metric, first_violation
from easyllm.corpus.document import Rejection


def rule_broken(rule, text):
    result = outcome(rule, text)
    return result.rule if isinstance(result, Violation) else None


# --- limits ---


def test_a_limit_is_inclusive_and_later_statistics_are_not_computed_after_a_violation():
    computed = []

    def figures():
        for name, value in (("low", 1.0), ("high", 2.0), ("broken", 2.1), ("never", 9.0)):
            computed.append(name)
            yield Metric(name, value, 1.0, 2.0)

    assert first_violation("rule", figures()) == Violation("rule.broken", 2.1)
    assert computed == ["low", "high", "broken"]
    assert first_violation("rule", [Metric("open", 1e9)]) is None


def test_defaults_are_the_published_limits():
    quality, repetition, fineweb = GopherQuality(), GopherRepetition(), FineWebQuality()
    assert (quality.min_words, quality.max_words) == (50, 100_000)
    assert (quality.min_mean_word_length, quality.max_mean_word_length) == (3, 10)
    assert (quality.max_hash_ratio, quality.max_ellipsis_ratio) == (0.1, 0.1)
    assert (quality.max_bullet_lines, quality.max_ellipsis_lines) == (0.9, 0.3)
    assert (quality.min_alphabetic_words, quality.min_stop_words) == (0.8, 2)
    assert set(quality.stop_words) == {"the", "be", "to", "of", "and", "that", "have", "with"}
    assert (repetition.max_duplicate_lines, repetition.max_duplicate_paragraphs) == (0.3, 0.3)
    assert repetition.max_duplicate_line_characters == 0.2
    assert repetition.max_duplicate_paragraph_characters == 0.2
    assert repetition.max_top_ngram_characters == {2: 0.2, 3: 0.18, 4: 0.16}
    limits = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1}
    assert repetition.max_duplicate_ngram_characters == limits
    assert (fineweb.min_punctuated_lines, fineweb.max_short_lines) == (0.12, 0.67)
    assert (fineweb.max_duplicate_line_characters, fineweb.max_newlines_per_word) == (0.01, 0.3)
    assert fineweb.short_line_characters == 30


def prose(words, length=4):
    """Returns distinct words of `length` letters, two of them stop words."""
    letters = itertools.product("bcdfghjklmnpqrstvwxz", repeat=length)
    return ["the", "that", *("".join(next(letters)) for _ in range(words - 2))]


GOPHER_QUALITY_CASES = {
    "words": [(prose(49), True), (prose(50), False), ([*prose(49), *"!?;"], True)],
    "mean_word_length": [
        (["of", "to", *["be"] * 30, *prose(30, 3)[2:]], True),
        ([*prose(60, 12)], True),
        ([*prose(60, 10)], False),
    ],
    "hash_ratio": [(prose(89) + ["#"] * 11, True), (prose(90) + ["#"] * 10, False)],
    "ellipsis_ratio": [
        (prose(50) + [w + "..." for w in prose(50)[2:22]], True),
        (prose(60) + [w + "…" for w in prose(20)[2:14]] + ["end"], True),
        (prose(95) + [w + "…" for w in prose(20)[2:7]] + ["end"], False),
    ],
    "bullet_lines": [
        ([f"\n- the words of {w}" for w in prose(60)], True),
        ([f"\n• the words of {w}" for w in prose(90)] + ["\nplain"] * 10, False),
        ([f"\n• the words of {w}" for w in prose(91)] + ["\nplain"] * 9, True),
    ],
    "ellipsis_lines": [
        (["many other words in that line\n"] * 6 + ["the line with more ...\n"] * 4, True),
        (["many other words in that line\n"] * 6 + ["the line with more …\n"] * 4, True),
        (["many other words in that line\n"] * 7 + ["the line with more …\n"] * 3, False),
    ],
    "alphabetic_words": [(prose(79) + ["12:5"] * 7, True), (prose(80) + ["1999"] * 20, False)],
    "stop_words": [(prose(60)[1:], True), (prose(60), False), (["the"] * 3 + prose(60)[2:], True)],
}


@pytest.mark.parametrize(
    ("name", "words", "is_rejected"),
    [(name, words, bad) for name, cases in GOPHER_QUALITY_CASES.items() for words, bad in cases],
)
def test_gopher_quality_rejects_beyond_each_limit_but_not_at_it(name, words, is_rejected):
    expected = f"gopher_quality.{name}" if is_rejected else None
    assert rule_broken(GopherQuality(), " ".join(words)) == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("duplicate_paragraphs", "one\n\n" * 4 + "\n\n".join(prose(5, 60))),
        (
            "duplicate_paragraph_characters",
            "x" * 90 + "\n\n" + "x" * 90 + "\n\n" + "\n\n".join(prose(9)),
        ),
        ("duplicate_lines", "one\n" * 4 + "\n".join(prose(5, 60))),
        ("duplicate_line_characters", "x" * 90 + "\n" + "x" * 90 + "\n" + "\n".join(prose(9))),
        ("top_2_gram_characters", " ".join(f"big deal {word}" for word in prose(30))),
        ("top_3_gram_characters", " ".join(f"a big deal {w} {w}q" for w in prose(30, 7))),
        ("top_4_gram_characters", " ".join(f"of a big deal {w} {w}q {w}z" for w in prose(30, 9))),
        ("duplicate_5_gram_characters", " ".join([*prose(60), "-", *prose(60)])),
    ],
)
def test_gopher_repetition_names_the_statistic_that_is_too_high(name, text):
    result = outcome(GopherRepetition(), text)
    assert isinstance(result, Violation)
    assert result.rule == f"gopher_repetition.{name}"
    assert (
        result.value == {f.name: f.value for f in GopherRepetition().figures(TextView(text))}[name]
    )


@pytest.mark.parametrize("n", range(2, 11))
def test_each_ngram_order_has_its_own_limit(n):
    text = " ".join([*prose(n + 2), *prose(n + 2), *prose(50, 6)[2:]])
    statistics = NgramStatistics(text.split())
    for field, name, value in (
        ("max_top_ngram_characters", f"top_{n}_gram_characters", statistics.top_characters(n)),
        (
            "max_duplicate_ngram_characters",
            f"duplicate_{n}_gram_characters",
            statistics.duplicate_characters(n),
        ),
    ):
        share = value / len(text)
        off = {"max_top_ngram_characters": {}, "max_duplicate_ngram_characters": {}}
        assert share > 0
        assert rule_broken(GopherRepetition(**{**off, field: {n: share}}), text) is None
        tight = GopherRepetition(**{**off, field: {n: share - 1e-9}})
        assert outcome(tight, text) == Violation(f"gopher_repetition.{name}", share)


def test_a_limit_of_none_is_disabled():
    text = "one\n" * 9
    off = {name: None for name in GopherRepetition.model_fields if name.startswith("max_dup")}
    off["max_duplicate_ngram_characters"] = off["max_top_ngram_characters"] = {}
    assert rule_broken(GopherRepetition(), text) is not None
    assert rule_broken(GopherRepetition(**off), text) is None


@pytest.mark.parametrize("text", ["", " \n\n ", "...", "\x00", "。"])
@pytest.mark.parametrize("preset", PRESETS)
def test_an_empty_text_is_rejected_by_every_preset(preset, text):
    assert isinstance(Cleaner(CleanConfig(preset=preset)).clean(document(text)), Rejection)


# --- C4 ---


def test_c4_keeps_lines_that_are_sentences():
    text = (
        "Menu\n  A proper line here. \nno end mark at all\nToo short.\nShe said “go "
        "now.”\nIt goes on and on...\n\nWhy not ask?"
    )
    rule = C4Quality(min_sentences=0)
    kept = "A proper line here.\nShe said “go now.”\nWhy not ask?"
    assert outcome(rule, text).text == kept
    loose = C4Quality(min_sentences=0, terminal_punctuation=False)
    assert outcome(loose, text).text.splitlines() == [
        *("A proper line here.", "no end mark at all", "She said “go now.”"),
        *("It goes on and on...", "Why not ask?"),
    ]


def test_c4_drops_javascript_and_policy_lines_citations_and_lines_with_an_overlong_word():
    text = (
        "Please enable JavaScript to go on.\nRead our Privacy Policy before use.\n"
        f"Here comes {'x' * 1001} no less.\nThe moon[12] is round[citation needed] and "
        "bright[edit]."
    )
    assert outcome(C4Quality(min_sentences=0), text).text == "The moon is round and bright."
    off = C4Quality(
        min_sentences=0,
        drop_javascript_lines=False,
        drop_policy_lines=False,
        remove_citations=False,
        max_word_length=None,
    )
    assert outcome(off, text).text == text


def test_c4_rejects_pages_with_filler_code_or_too_few_sentences():
    assert outcome(C4Quality(), ENGLISH).text == ENGLISH
    assert outcome(C4Quality(), ENGLISH + "\nLorem Ipsum dolor.") == Violation(
        "c4_quality.lorem_ipsum", 1
    )
    assert outcome(C4Quality(), ENGLISH + "\n{{{") == Violation("c4_quality.curly_brackets", 3)
    four = "One is not enough. Nor are two! Three might do? We stop at four."
    assert outcome(C4Quality(), four) == Violation("c4_quality.sentences", 4)
    assert rule_broken(C4Quality(), four + " Five are enough.") is None


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", 0),
        ("no mark", 1),
        ("One. Two! Three?", 3),
        ("J. K. Rowling wrote it.", 1),
        ("Well... maybe.", 1),
        ('"Stop!" he said. Why?', 3),
        ("Pi is 3.14 or so.", 1),
        ("不知道。真的！\n好。", 3),
        ("a\nb", 2),
    ],
)
def test_sentences_end_at_marks_before_a_space_and_at_lines(text, sentences):
    assert count_sentences(text) == sentences


def test_c4_returns_the_same_view_if_it_changes_nothing():
    view = TextView(ENGLISH)
    assert C4Quality().apply(view) is view


# --- FineWeb, Han share, length ---


LONG = "a line that is longer than thirty characters"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("punctuated_lines", "\n".join([f"{LONG} {i}" for i in range(8)] + [LONG + "."])),
        ("short_lines", "\n".join(["short."] + [f"brief {i}." for i in range(6)] + [LONG + "."])),
        ("duplicate_line_characters", f"{LONG}.\n{LONG}.\nand another one to make up the text."),
        ("newlines_per_word", "\n\n\n\n\n\n".join(f"{i}{'x' * 31}" for i in range(8)) + "."),
    ],
)
def test_fineweb_names_the_reason_for_a_rejection(name, text):
    assert rule_broken(FineWebQuality(), text) == f"fineweb_quality.{name}"
    assert rule_broken(FineWebQuality(), ENGLISH) is None


def test_fineweb_accepts_values_at_each_limit():
    half_short = FineWebQuality(max_short_lines=0.5, max_newlines_per_word=None)
    lines = [f"{LONG} {i}" for i in range(22)] + [f"{LONG} {i}." for i in range(3)]
    assert rule_broken(FineWebQuality(), "\n".join(lines)) is None  # 3/25 = 0.12
    assert rule_broken(half_short, f"{'x' * 30}\n{'y' * 31}.") is None
    stricter = half_short.model_copy(update={"max_short_lines": 0.49})
    assert rule_broken(stricter, f"{'x' * 30}\n{'y' * 31}.") == "fineweb_quality.short_lines"
    twice = "\n".join(["x" * 40 + "”"] * 2)
    assert outcome(half_short, twice) == Violation("fineweb_quality.duplicate_line_characters", 0.5)
    exactly = FineWebQuality(max_newlines_per_word=0.5)
    assert rule_broken(exactly, f"{'x' * 31}\n{'y' * 31}") == "fineweb_quality.punctuated_lines"
    assert rule_broken(exactly, f"{'x' * 31}.\n{'y' * 31}\n\n{'z' * 31} ok.") is None


def test_han_share_counts_han_characters_among_all_non_whitespace():
    assert rule_broken(HanShare(), "中文字 abcdefg \n") is None  # 3 of 10
    assert outcome(HanShare(), "中文字 abcdefgh") == Violation("han_share.share", 3 / 11)
    assert outcome(HanShare(min_share=0), "").text == ""


def test_length_limits_words_and_characters():
    assert rule_broken(DocumentLength(min_words=2, max_words=2), "two words!") is None
    assert outcome(DocumentLength(min_words=3), "two words!") == Violation("length.words", 2)
    assert outcome(DocumentLength(max_characters=3), "four") == Violation("length.characters", 4)
    assert rule_broken(DocumentLength(min_words=4), "四个字好") is None
    assert rule_broken(DocumentLength(), "") is None


@pytest.mark.parametrize(
    "fields", [{"min_words": 9, "max_words": 3}, {"min_characters": 2, "max_characters": 1}]
)
def test_unsatisfiable_limits_are_an_error(fields):
    with pytest.raises(ConfigError, match="is above max_"):
        validate(DocumentLength, fields, source="recipe")


# --- language ---


def test_languages_are_identified_offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("no connection may be opened")

    monkeypatch.setattr("socket.socket.connect", refuse)
    assert identify_language(ENGLISH)[0] == "en"
    assert identify_language(CHINESE)[0] == "zh"
    assert identify_language("PLEASE KEEP THE DOOR CLOSED AT ALL TIMES")[0] == "en"
    assert identify_language(ENGLISH + "\ud800")[0] == "en"
    assert identify_language("1234 ... !")[0] == "und"


def test_language_rule_records_the_language_and_reports_the_one_found():
    rule = LanguageIdentification(allowed=("en", "de"))
    assert outcome(rule, ENGLISH).language == "en"
    assert outcome(rule, CHINESE) == Violation("language.code", "zh")
    score = identify_language(ENGLISH)[1]
    assert rule_broken(LanguageIdentification(min_score=score), ENGLISH) is None
    stricter = LanguageIdentification(min_score=score + 1e-6)
    assert outcome(stricter, ENGLISH) == Violation("language.score", score)


def test_language_rule_can_use_only_the_beginning():
    text = ENGLISH + "\n" + CHINESE * 9
    assert rule_broken(LanguageIdentification(), text) is not None
    assert rule_broken(LanguageIdentification(max_characters=len(ENGLISH)), text) is None


@pytest.mark.parametrize("code", ["EN", "english", "zho"])
def test_an_unknown_language_code_is_an_error(code):
    with pytest.raises(ConfigError, match=f"{code!r} is not a language code"):
        validate(LanguageIdentification, {"allowed": [code]}, source="recipe")
    assert {"en", "zh", "yue", "de"} <= LANGUAGES
