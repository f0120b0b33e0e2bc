"""Text extraction: the main text of HTML pages, and Markdown without invisible parts."""

import re

from easyllm.core.errors import DataError
from easyllm.corpus.files.blocks import optional
from easyllm.corpus.html.main_text import main_part
from easyllm.corpus.html.text import depth, text_of

MAX_PAGE_BYTES = 1 << 24
MAX_NESTING = 512
"""Maximum nesting depth of a page's blocks, as in browsers: time grows with its square."""
MAX_REPLACED = 0.01
"""Maximum share of replaced characters; above it, the detected encoding is considered wrong."""
_AS_IN_BROWSERS = {  # https://encoding.spec.whatwg.org: a label selects the largest superset
    "gbk": "gb18030",
    "big5": "big5hkscs",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
    "utf-16-le": "utf-8",  # a page whose <meta> is readable as ASCII bytes is not in UTF-16
    "utf-16-be": "utf-8",
}


def html_text(content: bytes) -> str:
    """Returns the main text of an HTML page: without navigation, footers and scripts.

    Paragraphs, lists, tables and code are preserved. The page is parsed with resiliparse
    (https://resiliparse.chatnoir.eu); `page_furniture` removes the boilerplate. (The main-content
    extraction of resiliparse 2.0 drops every `<ul>` and `<figure>`.) The `<title>` of the page is
    omitted: if it is part of the text, a heading repeats it; otherwise it names the site.

    Raises:
        DataError: the page is too large or nested too deeply, is not text, or cannot be parsed.
    """
    if len(content) > MAX_PAGE_BYTES:
        raise DataError(
            f"the page has {len(content)} bytes, more than the maximum of {MAX_PAGE_BYTES}"
        )
    html = optional("resiliparse.parse.html", "HTML files")
    page = decode_page(content)
    try:
        tree = html.HTMLTree.parse(page)
    except html.HTMLParserException as error:
        raise DataError(f"not HTML ({error})") from None
    if tree.body is None or tree.body.tag != "body":  # a frameset page has no body
        return ""
    blocks, elements = depth(tree.body) if page.count("<") > MAX_NESTING else (0, 0)
    if blocks > MAX_NESTING:
        raise DataError(f"blocks are nested deeper than {MAX_NESTING}")
    # Inline tags such as <b> that were never closed: the structure carries no information
    if elements > MAX_NESTING:
        return text_of(tree.body)
    return "\n\n".join(text for part in main_part(tree.body) if (text := text_of(part)))


def decode_page(content: bytes) -> str:
    """Decodes a page: as UTF-8 if its bytes are valid, else by its `<meta>`, else by detection.

    Non-ASCII bytes that are valid UTF-8 are almost never in another encoding, while a wrong
    `<meta>` is common. As in browsers, an invalid byte becomes U+FFFD, so that one such byte does
    not cause the page to be lost.

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
        raise DataError(f"not valid text in the detected encoding {encoding}")
    return text


def markdown_text(text: str) -> str:
    """Removes YAML front matter and HTML comments from Markdown; code is unchanged.

    >>> markdown_text("---\\ntitle: Tea\\n---\\n# Tea <!-- draft -->\\n`<!-- kept -->`\\n")
    '# Tea \\n`<!-- kept -->`\\n'
    """
    return _without_comments(_FRONT_MATTER.sub("", text, count=1))


# Every line must be a YAML key, an item, indented, a comment or blank, so that a text between two
# horizontal rules is not removed
_FRONT_MATTER = re.compile(
    r"\A---[ \t]*\r?\n(?=[^\s:#-][^\n:]*:)"
    r"(?:(?:[^\s:#-][^\n:]*:(?:[ \t\r][^\n]*)?|[ \t\r][^\n]*|-[ \t][^\n]*|#[^\n]*|)\n)*+"
    r"(?:---|\.\.\.)[ \t]*(?:\r?\n|\Z)"
)
_FENCE = re.compile(r"[ \t]*(`{3,}(?=[^`]*$)|~{3,})")
_COMMENT_OR_CODE = re.compile(r"<!--|(?<!`)(`++)[^`]*+\1")


def _without_comments(text: str) -> str:
    """Removes HTML comments outside code; an unclosed `<!--` is not a comment."""
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
    """Appends text[begin:end] without comments to `kept`.

    Returns:
        The end of the line, or the end of its last comment if that is on a later line.
    """
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
