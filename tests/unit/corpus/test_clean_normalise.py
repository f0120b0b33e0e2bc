"""Repair and normalisation of text: mojibake, invisible characters, widths."""

import ftfy
from ftfy.badness import MOJIBAKE_CATEGORIES, is_bad
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clean_documents import outcome, texts
from easyllm.corpus.clean import (
    Normalise,
    TextView,
)
from easyllm.corpus.clean import normalise as normalisation

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
