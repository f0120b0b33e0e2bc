"""Text of HTML pages and of Markdown files."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from document_files import read_content
from easyllm.core.errors import DataError
from easyllm.corpus import extract
from easyllm.corpus.document import Document
from easyllm.corpus.extract import decode_page, html_text, markdown_text

# HTML pages

PAGE = """<!doctype html><html><head><title>Tea | Site</title><meta \
charset={}><script>x()</script></head>
<body><nav><a href="/">Home</a> <a href="/b">Blog</a></nav>
<main><div><article><h1>关于茶</h1><p>茶是一种用茶叶和热水做成的饮料。</p>
<ol><li>green</li><li>black</li></ol><pre>a
  b</pre><img src="t.png" alt="a picture"></article></div></main>
<footer>Copyright, Privacy, Contact</footer></body></html>"""


PAGE_TEXT = "关于茶\n\n茶是一种用茶叶和热水做成的饮料。\n\n  1. green\n  2. black\na\n  b"


@pytest.mark.parametrize(
    ("declared", "encoding"),
    [
        ("utf-8", "utf-8"),
        ("utf-8", "utf-8-sig"),
        ("utf-8", "utf-16"),
        ("gb2312", "gb18030"),
        ("gb2312", "utf-8"),
        ("utf-16", "utf-8"),
        ("", "utf-8"),
    ],
)
def test_the_main_text_of_a_page_is_read_in_its_encoding(tmp_path, declared, encoding):
    (item,) = read_content(tmp_path, "tea.html", PAGE.format(declared).encode(encoding))
    assert item == Document(id="tea.html", source="s", text=PAGE_TEXT)


def test_pages_are_decoded_like_in_browsers():
    page = "<meta charset={}><p>{}"
    for declared, encoding, text in (
        ("gb2312", "gb18030", "𠀀 rare"),
        ("big5", "big5hkscs", "㗎"),
        ("shift_jis", "cp932", "①"),
        ("euc-kr", "cp949", "똠"),
        ("iso-8859-1", "cp1252", "“quoted”"),
        ("iso-2022-jp", "iso2022_jp", "お茶"),
        ("koi8-r", "koi8-r", "чай"),
    ):
        assert decode_page(page.format(declared, text).encode(encoding)).endswith(text)


def test_an_invalid_byte_does_not_lose_the_page():
    page = PAGE.format("utf-8").encode()
    broken = page.replace("饮".encode(), "饮".encode()[:2])
    assert html_text(broken) == PAGE_TEXT.replace("饮", "\ufffd")
    guessed = PAGE.format("gb2312").encode("gb18030").replace(b"<p>", b"<p>\xff")
    assert html_text(guessed) == PAGE_TEXT.replace("茶是", "\ufffd茶是")


def test_a_page_that_is_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(extract, "MAX_PAGE_BYTES", 100)
    assert html_text(b"<p>" + b"x" * 97) == "x" * 97
    with pytest.raises(DataError, match="101 bytes, more than the maximum of 100"):
        html_text(b"<p>" + b"x" * 98)


def test_blocks_may_be_nested_as_deeply_as_in_browsers():
    assert html_text(b"<div>" * 511 + b"<p>x" + b"</div>" * 511) == "x"
    assert html_text(b"<div></div><p><b>x</b></p>" * 3000).split() == ["x"] * 3000
    for page in (b"<div>" * 600 + b"x", b"<DIV><article>" * 300 + b"x"):
        with pytest.raises(DataError, match="deeper"):
            html_text(page)


# Markdown


@pytest.mark.parametrize(
    ("markdown", "text"),
    [
        ("# Tea\n\ntext\n", "# Tea\n\ntext\n"),
        ("---\ntitle: Tea\ntags:\n  - a\n- b\n\n# c\n---\n# Tea\n", "# Tea\n"),
        ("---\r\ntitle: Tea\r\n---\r\n# Tea\r\n", "# Tea\r\n"),
        ("---\ntitle: Tea\n...\n# Tea\n", "# Tea\n"),
        ("---\ntitle: Tea\n---", ""),
        ("---\n\nA line above.\n\n---\n", "---\n\nA line above.\n\n---\n"),
        (
            "---\nNote: this is prose\nthat goes on.\n---\nx",
            "---\nNote: this is prose\nthat goes on.\n---\nx",
        ),
        ("---\ntitle: never closed\n# Tea\n", "---\ntitle: never closed\n# Tea\n"),
        ("text\n---\na: b\n---\n", "text\n---\na: b\n---\n"),
        ("a <!-- x --> b", "a  b"),
        ("a <!-- x\ny\n--> b\nc <!--z-->", "a  b\nc "),
        ("<!-- a --><!-- b -->c", "c"),
        ("a <!-- open\nb", "a <!-- open\nb"),
        ("a --> b <!-- open", "a --> b <!-- open"),
        ("<!-->\nb -->c", "c"),
        ("a <!--> b", "a <!--> b"),
        ("```\n``` html\n<!-- kept -->\n```\n", "```\n``` html\n<!-- kept -->\n```\n"),
        ("```html\n<!-- kept -->\n```\n<!-- cut -->d", "```html\n<!-- kept -->\n```\nd"),
        ("~~~\n```\n<!-- kept -->\n~~~\n<!-- cut -->", "~~~\n```\n<!-- kept -->\n~~~\n"),
        ("````\n```\n<!-- kept -->\n````\n<!-- cut -->", "````\n```\n<!-- kept -->\n````\n"),
        (
            "- item\n    ```\n    <!-- kept -->\n    ```\n",
            "- item\n    ```\n    <!-- kept -->\n    ```\n",
        ),
        ("```\n<!-- never closed -->", "```\n<!-- never closed -->"),
        ("use `<!-- kept -->` <!-- cut -->", "use `<!-- kept -->` "),
        ("use ``a ` <!-- kept -->`` c", "use ``a ` <!-- kept -->`` c"),
        ("```x``` <!-- cut --> b", "```x```  b"),
    ],
)
def test_markdown_keeps_text_and_code_but_not_front_matter_and_comments(markdown, text):
    assert markdown_text(markdown) == text


def test_markdown_without_comments_is_unchanged():
    @settings(max_examples=100, deadline=None)
    @given(st.text("a`~<!->\n ", max_size=60))
    def check(text):
        result = markdown_text(text)
        assert len(result) <= len(text)
        if "-->" not in text or "<!--" not in text:
            assert result == text

    check()
