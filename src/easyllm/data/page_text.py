"""An HTML element as text: blocks on lines of their own, lists with markers, table rows in one line, code as it is.

`tree` here is resiliparse's DOM. Nothing is decided here about what belongs to a page's main part (`page_furniture`); left
out is only what no reader sees or what is not text: scripts, form fields, pronunciation aids.

    <ul><li>one<li>two</ul>                  "  • one\\n  • two"
    <tr><th>A</th><td>1</td></tr>            "A | 1"
    <math>…<annotation>x^2</annotation>      "$x^2$"
"""

import re
from typing import Any

SKIPPED = frozenset(
    [
        *("script", "style", "noscript", "template", "head", "title", "svg", "iframe", "object", "embed", "canvas"),
        *("audio", "video", "select", "option", "datalist", "input", "textarea", "button", "img", "map", "area"),
        *("rt", "rp", "progress", "meter", "annotation", "annotation-xml"),
    ]
)  # fmt: skip
PARAGRAPHS = frozenset(
    [
        *("p", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "figure", "details", "article", "section", "main"),
        *("header", "footer", "aside", "nav", "fieldset", "hr", "address"),
    ]
)  # fmt: skip
"""Elements with a blank line around them."""
LINES = frozenset(
    [
        *("div", "ul", "ol", "menu", "dir", "li", "dl", "dt", "dd", "pre", "table", "thead", "tbody", "tfoot", "tr"),
        *("caption", "figcaption", "summary", "form", "legend", "center", "body", "html", "hgroup"),
    ]
)  # fmt: skip
"""Elements on lines of their own."""
BLOCKS = (PARAGRAPHS | LINES | {"td", "th"}) - {"body", "html"}
LISTS = frozenset(["ul", "ol", "menu", "dir"])
CELLS = ("td", "th")
HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6", "summary", "dt")
CELL_SEPARATOR = " | "
_LAYOUT_BLOCKS = "p, div, ul, ol, dl, table, pre, blockquote, h1, h2, h3, h4"
_LAYOUT_CHARACTERS = 400  # in one cell: more is not a table entry
_TEXT, _ELEMENT = 3, 1
_SPACE = re.compile(r"[ \t\n\r\f]+")
_CJK = re.compile("[\u2e80-\u303f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uff60]")


def text_of(root: Any) -> str:
    """The text of an element and all below it."""
    writer = _Writer()
    node = root
    while True:
        descend = _enter(node, writer)
        child = node.first_child if descend else None
        if child is not None:
            node = child
            continue
        while True:
            if descend:
                _leave(node, writer)
            if node == root:
                return writer.text()
            following = node.next
            if following is not None:
                node = following
                break
            node = node.parent
            descend = True


def depth(root: Any) -> tuple[int, int]:
    """How deep an element's blocks are nested, and how deep all its elements."""
    most_blocks = most = blocks = elements = 0
    node = root
    while True:
        is_block = node.type == _ELEMENT and node.tag in BLOCKS
        blocks += is_block
        elements += 1
        most_blocks, most = max(most_blocks, blocks), max(most, elements)
        following = node.first_child
        while following is None:
            blocks -= node.type == _ELEMENT and node.tag in BLOCKS
            elements -= 1
            if node == root:
                return most_blocks, most
            following = node.next
            if following is None:
                node = node.parent
        node = following


class _Writer:
    """Puts text together: collapses white space, keeps the largest of several breaks, indents lists."""

    def __init__(self) -> None:
        self.preformatted = 0
        self.lists: list[int | None] = []  # of each open list the next number; None: it has bullets
        self.tables: list[bool] = []  # of each open table whether it is for layout
        self.cells = 0  # open cells of tables that are not
        self._pieces: list[str] = []
        self._break = 0  # line breaks due before the next text
        self._space = ""  # white space due before the next text, as the page has it
        self._marker = ""

    def text(self) -> str:
        """All that was written."""
        return "".join(self._pieces).strip("\n")

    def write(self, text: str) -> None:
        """Text of the page, in which white space says nothing."""
        if self.preformatted:
            self.write_as_is(text)
            return
        position = 0
        for space in _SPACE.finditer(text):
            if space.start() > position:
                self._put(text[position : space.start()])
            self._space += space[0]
            position = space.end()
        if position < len(text):
            self._put(text[position:])

    def write_as_is(self, text: str) -> None:
        """Text whose white space is kept."""
        if text:
            self._put(text)

    def line_break(self, count: int) -> None:
        """At least so many line breaks before what comes next; a space in a cell, so that a row stays one line."""
        if self.cells and not self.preformatted:
            self._space = " "
        else:
            self._break = max(self._break, count)
            self._space = ""

    def separate(self) -> None:
        """What stands between two cells of a row."""
        self._space = ""
        self._put(CELL_SEPARATOR)

    def mark(self, marker: str) -> None:
        """A marker in front of the next text of a list item."""
        self._marker = marker

    def _put(self, text: str) -> None:
        last = self._pieces[-1] if self._pieces else ""
        if self._break and last:
            breaks = self._break - (len(last) - len(last.rstrip("\n")))
            last = "\n" * max(0, breaks) or last
            self._pieces += [last] if breaks > 0 else []
        self._break = 0
        if last[-1:] in ("", "\n"):
            if self.lists and not self.preformatted:
                self._pieces.append("  " * (len(self.lists) + (0 if self._marker else 1)))
        elif self._space and not last.endswith(" ") and not self._is_joined(last[-1], text[0]):
            self._pieces.append(" ")
        self._space = ""
        self._pieces.append(self._marker + text)
        self._marker = ""

    def _is_joined(self, before: str, after: str) -> bool:
        """Whether a line break in the page is none in the text: scripts without spaces are broken anywhere."""
        return "\n" in self._space and bool(_CJK.match(before) and _CJK.match(after))


def _enter(node: Any, writer: _Writer) -> bool:
    """Writes what an element or text begins with; returns whether what is in it follows."""
    if node.type == _TEXT:
        writer.write(node.value or "")
        return False
    if node.type != _ELEMENT:
        return False
    tag = node.tag
    if tag == "script":
        _write_tex_script(node, writer)
        return False
    if tag == "button" and _is_in_heading(node):
        return True
    if tag in SKIPPED:
        return False
    if tag == "math":
        _write_math(node, writer)
        return False
    if tag == "br":
        if writer.preformatted:
            writer.write_as_is("\n")
        else:
            writer.line_break(1)
        return False
    _break_around(tag, writer)
    if tag == "pre":
        writer.preformatted += 1
    elif tag in LISTS:
        writer.lists.append(_first_number(node) if tag == "ol" else None)
    elif tag == "li":
        _mark_item(node, writer)
    elif tag == "table":
        writer.tables.append(_is_layout(node))
    elif tag in CELLS and writer.tables:
        if writer.tables[-1]:
            writer.line_break(2)
        else:
            if _has_cell_before(node):
                writer.separate()
            writer.cells += 1
    return True


def _leave(node: Any, writer: _Writer) -> None:
    tag = node.tag
    if tag == "pre":
        writer.preformatted -= 1
    elif tag in LISTS and writer.lists:
        writer.lists.pop()
    elif tag == "table" and writer.tables:
        writer.tables.pop()
    elif tag == "li":
        writer.mark("")  # an empty item has no marker
    elif tag in CELLS and writer.cells and not writer.tables[-1]:
        writer.cells -= 1
    _break_around(tag, writer)


def _break_around(tag: str, writer: _Writer) -> None:
    if tag in PARAGRAPHS:
        writer.line_break(1 if writer.lists and tag == "p" else 2)
    elif tag in LINES:
        writer.line_break(1)


def _mark_item(node: Any, writer: _Writer) -> None:
    if not writer.lists or writer.cells:
        return
    number = writer.lists[-1]
    if number is None:
        writer.mark("• ")
        return
    number = _whole_number(node.getattr("value"), number)
    writer.mark(f"{number}. ")
    writer.lists[-1] = number + 1


def _first_number(node: Any) -> int:
    return _whole_number(node.getattr("start"), 1)


def _whole_number(text: str | None, default: int) -> int:
    return int(text) if text and re.fullmatch(r"\s*-?[0-9]{1,9}\s*", text) else default


def _has_cell_before(node: Any) -> bool:
    before = node.prev
    while before is not None:
        if before.type == _ELEMENT and before.tag in CELLS:
            return True
        before = before.prev
    return False


def _is_layout(table: Any) -> bool:
    """Whether a table arranges a page: a table in it, or a cell with more than an entry."""
    if table.query_selector("table") is not None:
        return True
    cells = table.query_selector_all("td, th").values()
    return any(
        len(cell.text) > _LAYOUT_CHARACTERS
        or len(cell.query_selector_all(_LAYOUT_BLOCKS).values()) > 1
        for cell in cells
    )


def _is_in_heading(node: Any) -> bool:
    """Whether a button is what opens an answer: its text is the question."""
    parent = node.parent
    return parent is not None and parent.type == _ELEMENT and parent.tag in HEADINGS


def _write_math(node: Any, writer: _Writer) -> None:
    """A formula in TeX where the page has it, else the characters of its parts."""
    tex = node.query_selector('annotation[encoding="application/x-tex"]')
    source = tex.text if tex is not None else node.getattr("alttext")
    if source and source.strip():
        writer.write_as_is(f"${source.strip()}$")
    else:
        writer.write(node.text)


def _write_tex_script(node: Any, writer: _Writer) -> None:
    kind = node.getattr("type") or ""
    if kind.startswith("math/tex") and node.text.strip():
        mark = "$$" if "mode=display" in kind.replace(" ", "") else "$"
        writer.write_as_is(f"{mark}{node.text.strip()}{mark}")
