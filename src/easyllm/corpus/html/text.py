"""Converts an HTML element to text: blocks on separate lines, list markers, one line per table row.

Code is unchanged. The DOM is that of resiliparse. This module does not decide what belongs to the
main part of a page (`page_furniture` does); it omits only what is not visible or not text: scripts,
form fields, pronunciation aids.

    <ul><li>one<li>two</ul>                  "  • one\\n  • two"
    <tr><th>A</th><td>1</td></tr>            "A | 1"
    <math>…<annotation>x^2</annotation>      "$x^2$"
"""

import re

from easyllm.corpus.html.node import Node

SKIPPED = frozenset(
    [
        *(
            "script", "style", "noscript", "template", "head", "title",
            "svg", "iframe", "object", "embed", "canvas",
        ),
        *(
            "audio", "video", "select", "option", "datalist", "input",
            "textarea", "button", "img", "map", "area",
        ),
        *("rt", "rp", "progress", "meter", "annotation", "annotation-xml"),
    ]
)  # fmt: skip
PARAGRAPHS = frozenset(
    [
        *(
            "p", "h1", "h2", "h3", "h4", "h5", "h6",
            "blockquote", "figure", "details", "article", "section", "main",
        ),
        *("header", "footer", "aside", "nav", "fieldset", "hr", "address"),
    ]
)  # fmt: skip
"""Elements with a blank line before and after them."""
LINES = frozenset(
    [
        *(
            "div", "ul", "ol", "menu", "dir", "li", "dl", "dt",
            "dd", "pre", "table", "thead", "tbody", "tfoot", "tr",
        ),
        *("caption", "figcaption", "summary", "form", "legend", "center", "body", "html", "hgroup"),
    ]
)  # fmt: skip
"""Elements that start and end on a separate line."""
BLOCKS = (PARAGRAPHS | LINES | {"td", "th"}) - {"body", "html"}
LISTS = frozenset(["ul", "ol", "menu", "dir"])
CELLS = ("td", "th")
HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6", "summary", "dt")
CELL_SEPARATOR = " | "
_LAYOUT_BLOCKS = "p, div, ul, ol, dl, table, pre, blockquote, h1, h2, h3, h4"
_LAYOUT_CHARACTERS = 400  # a cell with more characters is not an entry of a data table
_TEXT, _ELEMENT = 3, 1
_SPACE = re.compile(r"[ \t\n\r\f]+")
_CJK = re.compile("[\u2e80-\u303f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uff60]")


def text_of(root: Node) -> str:
    """Returns the text of an element and its descendants."""
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


def depth(root: Node) -> tuple[int, int]:
    """Returns the maximum nesting depth of an element's blocks, and of all its elements."""
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
    """Builds the text: collapses white space, merges consecutive line breaks, indents lists."""

    def __init__(self) -> None:
        self.preformatted = 0  # nesting depth of <pre>
        self.lists: list[int | None] = []  # next number of each open list; None for bullets
        self.tables: list[bool] = []  # whether each open table is a layout table
        self.cells = 0  # number of open cells of data tables
        self._pieces: list[str] = []
        self._break = 0  # pending line breaks before the next text
        self._space = ""  # pending white space before the next text, as in the page
        self._marker = ""

    def text(self) -> str:
        """Returns everything written so far."""
        return "".join(self._pieces).strip("\n")

    def write(self, text: str) -> None:
        """Writes text of the page, collapsing white space unless in preformatted text."""
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
        """Writes text with its white space unchanged."""
        if text:
            self._put(text)

    def line_break(self, count: int) -> None:
        """Requests at least `count` line breaks before the next text.

        In a cell of a data table it requests a space, so that a row remains on one line.
        """
        if self.cells and not self.preformatted:
            self._space = " "
        else:
            self._break = max(self._break, count)
            self._space = ""

    def separate(self) -> None:
        """Writes the separator between two cells of a row."""
        self._space = ""
        self._put(CELL_SEPARATOR)

    def mark(self, marker: str) -> None:
        """Sets the marker to write before the next text, that of a list item."""
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
        """Returns whether to drop a line break of the source between two CJK characters.

        Scripts without spaces are wrapped anywhere, so such a line break is not a space.
        """
        return "\n" in self._space and bool(_CJK.match(before) and _CJK.match(after))


def _enter(node: Node, writer: _Writer) -> bool:
    """Writes the start of an element, or a text node; returns whether to visit the children."""
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


def _leave(node: Node, writer: _Writer) -> None:
    tag = node.tag
    if tag == "pre":
        writer.preformatted -= 1
    elif tag in LISTS and writer.lists:
        writer.lists.pop()
    elif tag == "table" and writer.tables:
        writer.tables.pop()
    elif tag == "li":
        writer.mark("")  # the marker of an empty item was not written
    elif tag in CELLS and writer.cells and not writer.tables[-1]:
        writer.cells -= 1
    _break_around(tag, writer)


def _break_around(tag: str, writer: _Writer) -> None:
    if tag in PARAGRAPHS:
        writer.line_break(1 if writer.lists and tag == "p" else 2)
    elif tag in LINES:
        writer.line_break(1)


def _mark_item(node: Node, writer: _Writer) -> None:
    if not writer.lists or writer.cells:
        return
    number = writer.lists[-1]
    if number is None:
        writer.mark("• ")
        return
    number = _whole_number(node.getattr("value"), number)
    writer.mark(f"{number}. ")
    writer.lists[-1] = number + 1


def _first_number(node: Node) -> int:
    return _whole_number(node.getattr("start"), 1)


def _whole_number(text: str | None, default: int) -> int:
    return int(text) if text and re.fullmatch(r"\s*-?[0-9]{1,9}\s*", text) else default


def _has_cell_before(node: Node) -> bool:
    before = node.prev
    while before is not None:
        if before.type == _ELEMENT and before.tag in CELLS:
            return True
        before = before.prev
    return False


def _is_layout(table: Node) -> bool:
    """Returns whether a table is used for page layout.

    It is if it contains another table, or a cell with more text or blocks than a data entry.
    """
    if table.query_selector("table") is not None:
        return True
    cells = table.query_selector_all("td, th").values()
    return any(
        len(cell.text) > _LAYOUT_CHARACTERS
        or len(cell.query_selector_all(_LAYOUT_BLOCKS).values()) > 1
        for cell in cells
    )


def _is_in_heading(node: Node) -> bool:
    """Returns whether a button is in a heading, as in a FAQ, where its text is the question."""
    parent = node.parent
    return parent is not None and parent.type == _ELEMENT and parent.tag in HEADINGS


def _write_math(node: Node, writer: _Writer) -> None:
    """Writes a formula as TeX if the page provides it, else its plain characters."""
    tex = node.query_selector('annotation[encoding="application/x-tex"]')
    source = tex.text if tex is not None else node.getattr("alttext")
    if source and source.strip():
        writer.write_as_is(f"${source.strip()}$")
    else:
        writer.write(node.text)


def _write_tex_script(node: Node, writer: _Writer) -> None:
    kind = node.getattr("type") or ""
    if kind.startswith("math/tex") and node.text.strip():
        mark = "$$" if "mode=display" in kind.replace(" ", "") else "$"
        writer.write_as_is(f"{mark}{node.text.strip()}{mark}")
