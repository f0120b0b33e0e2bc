"""Chunks: they cover a document once, follow its structure, and fit."""

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from easyllm.retrieval.chunk import ChunkConfig, split_document

GUIDE = """# Guide

Intro line.

## Install

First paragraph has six words here.

Second paragraph has six words too.

```
# not a heading

pip install x
```

### Windows

Use WSL.

## Empty

## Last
The end."""


def words(text):
    """Offsets of words, which stand for tokens here."""
    return [m.span() for m in re.finditer(r"\w+|[^\w\s]", text)]


def split(text, size=16, *, is_markdown=True):
    return split_document(text, words, ChunkConfig(max_tokens=size), is_markdown=is_markdown)


def test_sections_are_not_mixed_and_headings_are_kept():
    found = [(" > ".join(c.headings), GUIDE[c.start : c.end]) for c in split(GUIDE, 64)]
    assert [name for name, _ in found] == [
        "Guide",
        "Guide > Install",
        "Guide > Install > Windows",
        "Guide > Empty",
        "Guide > Last",
    ]
    assert found[0][1] == "# Guide\n\nIntro line."
    assert "# not a heading" in found[1][1]
    assert found[4][1] == "## Last\nThe end."


def test_plain_text_has_no_headings():
    chunks = split("# a\n\nb", is_markdown=False)
    assert [c.headings for c in chunks] == [()]


def test_a_paragraph_that_does_not_fit_is_split_at_sentences():
    text = "One two three four five six seven eight. Nine ten eleven twelve thirteen. 十四。十五！"
    parts = [text[c.start : c.end] for c in split(text)]
    assert parts == [text[:74].strip(), "十四。十五！"] or parts[0].endswith("thirteen.")
    assert len(parts) == 2


def test_a_sentence_that_does_not_fit_is_split_between_tokens():
    text = " ".join(f"word{i}" for i in range(40))
    parts = [text[c.start : c.end] for c in split(text)]
    assert " ".join(parts) == text
    assert max(len(words(p)) for p in parts) == 16


def test_a_cut_is_between_words_where_there_is_a_space():
    def letters(text):
        return [(i, i + 1) for i in range(len(text))]

    text = "alpha beta 12345678 gamma"
    chunks = split_document(text, letters, ChunkConfig(max_tokens=16), is_markdown=False)
    assert [text[c.start : c.end] for c in chunks] == ["alpha beta", "12345678 gamma"]


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("ab .。\n#`|"), max_size=300), st.booleans())
def test_chunks_cover_a_document_once_and_fit(text, is_markdown):
    chunks = split(text, is_markdown=is_markdown)
    assert "".join("".join(text[c.start : c.end].split()) for c in chunks) == "".join(text.split())
    assert all(a.end <= b.start for a, b in pairwise(chunks))
    assert all(len(words(text[c.start : c.end])) <= 16 for c in chunks)


@pytest.mark.parametrize("text", ["", " \n\n ", "\f"])
def test_a_document_without_text_has_no_chunks(text):
    assert split(text) == []
