"""Main text of HTML pages: share of characters kept, boilerplate removed, and format of blocks."""

import time

import pytest

from easyllm.core.errors import DataError
from easyllm.corpus.extract import html_text
from html_pages import LAYOUTS, LONG, SHAPES, pages

PAGES = list(pages())


def words(text):
    return "".join(text.split())


def kept_share(page, text):
    """Returns the share of the main text's characters that the text contains, in order."""
    squeezed, position, kept = words(text), 0, 0
    for piece in map(words, page.main):
        at = squeezed.find(piece, position)
        if at < 0:
            at = squeezed.find(piece)
        if at >= 0:
            kept, position = kept + len(piece), at + len(piece)
    return kept / sum(len(words(piece)) for piece in page.main)


def leaked(page, text):
    """Returns the boilerplate that the text contains."""
    squeezed = words(text)
    return [piece for piece in page.furniture if words(piece) in squeezed]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_main_text_of_a_page_is_kept_completely_in_every_layout(shape):
    mine = [page for page in PAGES if page.name.startswith(f"{shape} / ")]
    assert len(mine) == len(LAYOUTS)
    for page in mine:
        text = html_text(page.html.encode())
        assert kept_share(page, text) == 1.0, (page.name, text)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_menus_and_other_boilerplate_are_removed_for_any_main_text(layout):
    for page in PAGES:
        if page.name.endswith(f" / {layout}"):
            text = html_text(page.html.encode())
            assert leaked(page, text) == [], (page.name, text)


def test_overall_the_main_text_is_kept_and_boilerplate_removed():
    texts = [html_text(page.html.encode()) for page in PAGES]
    assert len(PAGES) >= 250
    assert min(kept_share(page, text) for page, text in zip(PAGES, texts, strict=True)) >= 0.99
    assert all("var menu" not in text and "| Site" not in text for text in texts)


def text_of(html):
    return html_text(f"<body><main>{html}</main></body>".encode())


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>a</p>  loose  <p>b</p>", "a\n\nloose\n\nb"),
        ("<ul><li>a<li>b <ul><li>c</ul><li></ul>", "  • a\n  • b\n    • c"),
        ("<ul><li><p>a</p><p>b</p></li><li>c</ul>", "  • a\n    b\n  • c"),
        ("<ol start=3><li>a<li value=9>b<li>c</ol>", "  3. a\n  9. b\n  10. c"),
        ("<ol start=x><li>a</ol>", "  1. a"),
        ("<table><tr><td>a<td>b<td>c</tr><tr><td>d<td><td>f</tr></table>", "a | b | c\nd |  | f"),
        ("<table><tr><td><p>a</p></td><td>b<br>c</td></tr></table>", "a | b c"),
        ("<table><tr><td><p>a</p><p>b</p></td><td><p>c</p></td></tr></table>", "a\n\nb\n\nc"),
        ("<table><tr><td><table><tr><td>a<td>b</table><td>c</table>", "a | b\n\nc"),
        ("<dl><dt>T<dd>D1<dd>D2</dl>", "T\nD1\nD2"),
        ("<pre>\na\tb\n\n\n  c\n</pre><p>d</p>", "a\tb\n\n\n  c\n\nd"),
        ("<p>x</p><pre><code>l1\nl2</code></pre>", "x\n\nl1\nl2"),
        ("<p>a<wbr>b<br/>c \n d&nbsp;e</p>", "ab\nc d\xa0e"),
        ("<p>多<span>行</span>\n文\n  字 和 a\nb</p>", "多行文字 和 a b"),
        ("<figure><p>a</p><figcaption>b</figcaption></figure>", "a\n\nb"),
        ("<p>H<sub>2</sub>O<sup>1</sup></p>", "H2O1"),
        ("<custom-el><p>a</p></custom-el>", "a"),
        ("<p>a</p><textarea>b</textarea><select><option>c</select><svg><text>d</text></svg>", "a"),
        ('<script type="math/tex; mode=display">x</script>', "$$x$$"),
        ("<label>Name</label> <output>x</output>", "Name x"),
    ],
)
def test_blocks_are_rendered_like_in_a_browser(html, text):
    assert text_of(html) == text


@pytest.mark.parametrize(
    ("html", "kept"),
    [
        (
            "<article><h1>T</h1><p>{0}</p><ul class='sidebar-list'><li>One of tea</ul></article>",
            True,
        ),
        ("<article><p>{0}</p><ul class='footer'><li>One of tea</ul><p>{0}</p></article>", True),
        (
            "<article><p>{0}</p><dl class='sidebar'><dt>One of tea<dd>x</dl><p>{0}</p></article>",
            True,
        ),
        (
            "<div><p>{0}</p><ul><li><a href=x>One of tea</a><li><a "
            "href=y>Two</a></ul><p>{0}</p></div>",
            True,
        ),
        ("<div><p>{0}</p><ul><li><a href=x>One of tea</a><li><a href=y>Two</a></ul></div>", False),
        (
            "<div><p>Teas</p><ul><li><a href=x>One of tea</a><li><a "
            "href=y>Two</a></ul><p>{0}</p></div>",
            False,
        ),
        ("<div><p>{0}</p><ul class=share><li><a href=x>One of tea</a></ul><p>{0}</p></div>", False),
        (
            "<article><p>{0}</p><ul class=related-posts><li>One of tea</ul><p>{0}</p></article>",
            False,
        ),
        (
            "<article><p>{0}</p><div class=sidebar><p>One of tea</p></div><p>{0}</p></article>",
            False,
        ),
        (
            "<div><p>{0}</p><p>Related articles:</p><ul><li><a href=x>One of tea</a><li><a "
            "href=y>Two</a></ul><p>{0}</p></div>",
            False,
        ),
    ],
)
def test_a_list_within_the_text_is_kept_but_boilerplate_there_is_not(html, kept):
    text = html_text(f"<body>{html.format(LONG[0])}</body>".encode())
    assert LONG[0] in text
    assert ("One of tea" in text) == kept


def test_cells_are_never_separated_by_tabs():
    for page in PAGES:
        if "table" in page.name:
            assert "\t\t" not in html_text(page.html.encode())


@pytest.mark.parametrize("tag", ["b", "span class=nav", "font", "a href=x"])
def test_inline_elements_may_be_nested_to_any_depth(tag):
    page = f"<{tag}>word " * 3000
    assert html_text(page.encode()).split() == ["word"] * 3000


@pytest.mark.parametrize(
    "tag", ["div", "article", "ul><li", "blockquote", "section", "table><tr><td"]
)
def test_blocks_nested_too_deep_are_refused(tag):
    with pytest.raises(DataError, match="nested deeper"):
        html_text((f"<{tag}>x" * 600).encode())


@pytest.mark.parametrize("name", ["sidebar", "menu", ""])
def test_much_text_in_many_elements_does_not_hang(name):
    page = f'<div class="{name}">' * 500 + '<a href="x">word</a> ' * 20_000
    began = time.thread_time()
    html_text(page.encode())
    assert time.thread_time() - began < 40


@pytest.mark.parametrize(
    "html", ["", " ", "<", "plain", "<body>", "<frameset><frame></frameset>", "<!-- x -->", "</p>"]
)
def test_almost_empty_pages_are_handled(html):
    assert html_text(html.encode()) in ("", "plain", "<")


def test_a_page_of_many_links_and_names_takes_linear_time():
    block = (
        '<div class="item"><p>Some text here.</p><ul><li><a href="x">one</a></li><li><a '
        'href="y">two</a></li></ul></div>'
    )
    seconds = []
    for count in (300, 1200):
        began = time.thread_time()
        text = html_text(f"<body><h1>T</h1>{block * count}</body>".encode())
        seconds.append(time.thread_time() - began)
        assert text.count("Some text here.") == count
    assert seconds[1] < 12 * seconds[0] + 0.5
