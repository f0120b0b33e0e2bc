"""Patterns mean the same as in Python and in JSON Schema, or are refused."""

import random
import re
import warnings

import pytest

from easyllm.engine.guide_regex import narrows, portable_regex
from easyllm.engine.guide_spec import GuideError
from easyllm.engine.guided import Guides
from guide_texts import GuideTexts

PATTERNS = [
    *(r"^\d+$", r"^\D+$", r"^\w+$", r"^\W+$", r"^\s$", r"^\S+$", "^.$", "^[^a]$"),
    *(r"^[\d-]+$", r"^[^\d]$", r"^[\w.]+$", r"^[^\w]$", r"^[\s,]+$", r"^[^\s]$", r"^[\D]$"),
    *(r"^[\W_]$", r"^[^\W]$", r"^[^\D]$", r"^[\S]$", r"^[^\S]$"),
    *("b", "^b", "b$", "^a|b$", "^(a|b)$", "(^|,)a", "a(,|$)", "", "^$", "a*", "^a+?b$"),
    *("^[+--]$", "^[a&&b]$", "^[a~~b]$", "^[[a]$", "^[a|b]$", "^[a^]$", "^[-a]$", "^[a-]$"),
    *(r"^\-\.\/\@\"$", r"^a\/b$", "^a/b$", r"^\x41$", r"^中$", r"^[\x41-\x43]$", r"^[\b]$"),
    *("^{a}$", "^a{2}$", "^a{1,}$", "^a{1,2}$", "^]$", "^a{$", "^}$", "^(?:a)$", "(?i)^ab$"),
    *("^(?P<n>a)$", "^(?i:a)b$", "^[一-龥]{2}$", r"^\[\]\(\)$", r"^[\]\[]$", r"^\t\n$", "^ #$"),
]
TEXTS = [
    *("", "a", "b", "ab", "aa", "ba", "a,b", "b,a", "A", "AB", "0", "12", "３", "٣", "x中", "中"),
    *("中文", "½", "é", "_", "-", "!", ".", " ", "\t", "\n", "\r", "\u3000", "\x1f", "\ufeff"),
    *("\u2028", "\x85", "&", "~", "[", "]", "|", "^", "{a}", "{", "}", "a{", '-./@"', "a/b"),
    *("B", "\x08", "[]()", "\t\n", " #", "a-", "1-", "K", "K", "1.a"),
]


@pytest.fixture(scope="module")
def texts(tiny_tokenizer):
    return GuideTexts(Guides(tiny_tokenizer, vocab_size=320, eos_ids=(2,)), tiny_tokenizer, 2)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_matches_the_translation_matches_in_python(texts, pattern):
    """The texts without narrowed classes match in both or in neither."""
    for text in TEXTS:
        if any(ord(c) < 0x20 and c not in "\t\n\r\x08" for c in text):
            continue  # JSON escapes these as \\u, which guides do not write
        ours = texts.accepts_value(text, {"type": "string", "pattern": pattern})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # [a--b] may become a set difference
            theirs = re.search(pattern, text) is not None
        assert ours <= theirs, text
        if not narrows(pattern) and not ("$" in pattern and text.endswith("\n")):
            assert ours == theirs, text


@pytest.mark.parametrize(
    ("pattern", "text", "matches"),
    [
        *((r"^\d$", "3", True), (r"^\d$", "３", False), (r"^\D$", "３", False)),
        *((r"^\w$", "a", True), (r"^\w$", "中", False), (r"^\W$", "中", False)),
        *((r"^\W$", "!", True), (r"^\s$", " ", True), (r"^\s$", "\u3000", False)),
        *((r"^\S$", "\u3000", False), ("^.$", "\r", False), ("^.$", "中", True)),
        *((r"^[^\d]$", "３", False), (r"^[^\w]$", "中", False), (r"^\p{Han}$", "中", True)),
        *(
            (r"^\p{Script=Han}$", "中", True),
            (r"^\u4e2d$", "中", True),
            (r"^\u{4e2d}$", "中", True),
        ),
    ],
)
def test_classes_match_what_every_dialect_matches(texts, pattern, text, matches):
    schema = {"type": "string", "pattern": pattern}
    assert texts.accepts_value(text, schema) is matches


@pytest.mark.parametrize("seed", range(40))
def test_random_patterns_never_match_more_than_in_python(texts, seed):
    rng = random.Random(seed)
    atoms = ["a", "b", ".", r"\d", r"\W", "[ab]", r"[^\w]", "(a|b)", "(?:ba)", r"\S", "中"]
    parts = [rng.choice(atoms) + rng.choice(["", "", "*", "+", "?", "{1,2}"]) for _ in range(4)]
    pattern = rng.choice(["", "^"]) + "".join(parts) + rng.choice(["", "$"])
    for _ in range(20):
        text = "".join(rng.choice("abc1３中! ") for _ in range(rng.randint(0, 6)))
        if texts.accepts_value(text, {"type": "string", "pattern": pattern}):
            assert re.search(pattern, text), (pattern, text)


@pytest.mark.parametrize(
    ("regex", "text", "accepted"),
    [
        *((r"\d{3}", "123", True), (r"\d{3}", "1234", False), (r"^\d{3}$", "123", True)),
        *(("^a|b$", "a", True), ("^a|b$", "b", True), ("^a|b$", "ab", False)),
        *(("a/b", "a/b", True), (r"a\/b", "a/b", True), (r"a\\/b", "a\\/b", True)),
        *(
            ("a\nb", "a\nb", True),
            ("中|文", "文", True),
            ("(?i)ok", "OK", True),
            ("[.]", ".", True),
        ),
    ],
)
def test_a_regex_must_match_the_whole_text(texts, regex, text, accepted):
    assert texts.accepts(text, regex=regex) is accepted
    assert (re.fullmatch(regex, text) is not None) >= accepted


REFUSED = {
    "(?=a)b": "lookahead",
    "(?!a)b": "lookahead",
    "(?<=a)b": "lookbehind",
    "(?<!a)b": "lookbehind",
    r"(a)\1": "backreference",
    "(?P<n>a)(?P=n)": "backreference",
    r"(?<n>a)\k<n>": "backreference",
    r"\bfoo": "word boundary",
    r"a\B": "word boundary",
    r"\Aa": r"write \^",
    r"a\Z": r"write \$",
    r"a\z": r"write \$",
    r"\cA": r"\\c",
    "a++": "possessive",
    "a**": "quantifier",
    "*a": "quantifier",
    "(?>a)": "atomic",
    "(a)?(?(1)b)": "conditional",
    "(?#x)a": "comment",
    "(?s)a": "flags",
    "(?x)a": "flags",
    "a(?i)b": "flags",
    "[]a]": "empty class",
    "[^]": "empty class",
    "[[:alpha:]]": "alpha",
    "a{,2}": r"\{,",
    r"\0": r"\\0",
    r"\e": "unknown escape",
    r"\ud83d\ude00": "surrogate",
    r"\u12": "incomplete",
    r"\u12xy": "hexadecimal",
    r"\pL": "property",
    "(a": "not closed",
    "a)": "without",
    "[a": "incomplete",
    "a\\": "incomplete",
}


@pytest.mark.parametrize(("pattern", "named"), REFUSED.items())
def test_what_dialects_read_differently_is_refused_by_name(pattern, named):
    with pytest.raises(GuideError, match=named):
        portable_regex(pattern)


@pytest.mark.parametrize("regex", ["a^b", "a$b", "x(^a)", "(a$)b"])
def test_anchors_inside_a_regex_are_refused(regex):
    with pytest.raises(GuideError, match="inside the expression"):
        portable_regex(regex, whole=True)


@pytest.mark.parametrize("regex", ["[z-a]", "a{3,2}", "(?P<n", "^$"])
def test_an_invalid_regex_is_refused(texts, regex):
    with pytest.raises(GuideError):
        texts.accepts("a", regex=regex)
