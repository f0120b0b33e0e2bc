"""The text a reader of a page sees: the main text of HTML, Markdown without what is not shown."""

import re

from easyllm.core.errors import DataError
from easyllm.data.blocks import optional
from easyllm.data.page_furniture import main_part
from easyllm.data.page_text import depth, text_of

MAX_PAGE_BYTES = 1 << 24
MAX_NESTING = 512
"""Deepest nesting of a page's blocks, as in browsers: time grows with its square."""
MAX_REPLACED = 0.01
"""Most replaced characters, as a share of the page: above it the encoding is guessed wrong."""
_AS_IN_BROWSERS = {  # https://encoding.spec.whatwg.org: each name stands for its largest superset
    "gbk": "gb18030",
    "big5": "big5hkscs",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
    "utf-16-le": "utf-8",  # a page whose <meta> can be read byte by byte is not in UTF-16
    "utf-16-be": "utf-8",
}


def html_text(content: bytes) -> str:
    """The main text of an HTML page: without navigation, footers, scripts; paragraphs, lists, tables and code kept.

    Parsed by resiliparse (https://resiliparse.chatnoir.eu); what is main text is decided by `page_furniture`. (Its own
    extraction of main content, version 2.0, drops every `<ul>` and `<figure>`.) A page's `<title>` is left out: where it
    is part of the text, a heading repeats it, and elsewhere it names the site.

    Raises:
        DataError: the page is too large or nested too deep, is not text, or cannot be parsed.
    """
    if len(content) > MAX_PAGE_BYTES:
        raise DataError(f"a page of {len(content)} bytes, more than {MAX_PAGE_BYTES}")
    html = optional("resiliparse.parse.html", "HTML files")
    page = decode_page(content)
    try:
        tree = html.HTMLTree.parse(page)
    except html.HTMLParserException as error:
        raise DataError(f"not HTML ({error})") from None
    if tree.body is None or tree.body.tag != "body":  # a page of frames has none
        return ""
    blocks, elements = depth(tree.body) if page.count("<") > MAX_NESTING else (0, 0)
    if blocks > MAX_NESTING:
        raise DataError(f"blocks nested deeper than {MAX_NESTING}")
    if (
        elements > MAX_NESTING
    ):  # of tags like <b> that were never closed: too deep to tell what is in what
        return text_of(tree.body)
    return "\n\n".join(text for part in main_part(tree.body) if (text := text_of(part)))


def decode_page(content: bytes) -> str:
    """A page's characters: UTF-8 where its bytes are valid UTF-8, else what its `<meta>` says, else a guess.

    Valid UTF-8 that is not plain ASCII is hardly ever an accident, a wrong `<meta>` often is one. As in
    browsers a broken byte becomes U+FFFD, for one must not cost the page.

    Raises:
        DataError: more than `MAX_REPLACED` of the characters would be U+FFFD.
    """
    if not content.isascii():
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            pass
    detect = optional("resiliparse.parse.encoding", "HTML files").detect_encoding
    encoding = detect(content, from_html_meta=True) or "utf-8"
    encoding = _AS_IN_BROWSERS.get(encoding, encoding)
    text = content.decode(encoding, "replace")
    if text.count("\ufffd") > MAX_REPLACED * len(text):
        raise DataError(f"not text in {encoding}, which its bytes look like")
    return text


def markdown_text(text: str) -> str:
    """Markdown without a leading block of YAML (front matter) and without HTML comments; code stays as it is.

    >>> markdown_text("---\\ntitle: Tea\\n---\\n# Tea <!-- draft -->\\n`<!-- kept -->`\\n")
    '# Tea \\n`<!-- kept -->`\\n'
    """
    return _without_comments(_FRONT_MATTER.sub("", text, count=1))


_FRONT_MATTER = (
    re.compile(  # lines that are a key, indented, an item, a comment or blank: nothing of a text
        r"\A---[ \t]*\r?\n(?=[^\s:#-][^\n:]*:)"
        r"(?:(?:[^\s:#-][^\n:]*:(?:[ \t\r][^\n]*)?|[ \t\r][^\n]*|-[ \t][^\n]*|#[^\n]*|)\n)*+"
        r"(?:---|\.\.\.)[ \t]*(?:\r?\n|\Z)"
    )
)
_FENCE = re.compile(r"[ \t]*(`{3,}(?=[^`]*$)|~{3,})")
_COMMENT_OR_CODE = re.compile(r"<!--|(?<!`)(`++)[^`]*+\1")


def _without_comments(text: str) -> str:
    """`text` without comments outside fenced code; one that is never closed is no comment."""
    last_close = text.rfind("-->")
    if last_close < 0:
        return text
    kept: list[str] = []
    fence, position = "", 0
    while position < len(text):
        end = text.find("\n", position) + 1 or len(text)
        line = text[position:end]
        mark = _FENCE.match(line)
        if fence:
            kept.append(line)
            if mark and mark[1].startswith(fence) and line.strip() == mark[1]:
                fence = ""
        elif mark:
            fence = mark[1]
            kept.append(line)
        else:
            end = _keep_line(text, position, end, last_close, kept)
        position = end
    return "".join(kept)


def _keep_line(text: str, begin: int, end: int, last_close: int, kept: list[str]) -> int:
    """Adds text[begin:end] without its comments; returns where the last of them, or the line, ends."""
    while match := _COMMENT_OR_CODE.search(text, begin, end):
        if match[1] or match.start() > last_close - len("<!--"):
            kept.append(text[begin : match.end()])
            begin = match.end()
        else:
            kept.append(text[begin : match.start()])
            begin = text.index("-->", match.end()) + len("-->")
            if begin > end:
                return begin
    kept.append(text[begin:end])
    return end
