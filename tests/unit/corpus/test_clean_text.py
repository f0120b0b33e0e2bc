"""Statistics of texts (words, lines, n-grams) against naive references."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clean_documents import texts
from easyllm.corpus.clean import (
    TextView,
)
from easyllm.corpus.clean.ngrams import NgramStatistics
from easyllm.corpus.clean.text import repeated

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
