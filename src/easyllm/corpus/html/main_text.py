"""Boilerplate removal: finds the main part of an HTML page.

Removed are navigation, sidebars, footers, banners and invisible elements. The decision is made for
each element from its markup (tags, roles, class names) and its content: a menu consists of links
and little else, and is outside the text. In doubt, text is kept, since cleaning rules follow.
Elements that contain an `<h1>`, `<main>` or `<article>`, or most of the page, are never removed,
since a class such as `has-sidebar` on the body does not describe the body itself.
"""

import re
from collections.abc import Iterable, Iterator
from contextvars import ContextVar

from easyllm.corpus.html.element_names import boilerplate_kind
from easyllm.corpus.html.node import Node

UNSEEN = "script, style, noscript, template, dialog:not([open])"
HIDDEN = (
    '[hidden], [aria-hidden="true"], [style*="display:none"], [style*="display: none"], '
    '[style*="visibility:hidden"], [style*="visibility: hidden"]'
)
NAVIGATION = (
    "nav, [role=navigation], [role=menu], [role=menubar], [role=toolbar], [role=search], "
    "[role=contentinfo], [role=dialog], [role=alertdialog], [role=banner]"
)
TEXT_PARTS = 'main, [role=main], article, [itemprop="articleBody"]'
HEADS = f"{TEXT_PARTS}, h1"
QUOTES = ("blockquote", "figure", "q")
MENU_LINKS = 0.7
"""Minimum share of a list's characters in links for it to count as a list of links."""
SOME_LINKS = 0.4
SHORT_ITEM = 40
"""Maximum average number of characters of a menu's entries."""
MAX_SHARE = 0.5
LITTLE_PROSE = 0.2
"""Share of characters outside lists of links below which the lists are the page's main content."""

_CONTAINERS = frozenset(
    [
        "div",
        "section",
        "aside",
        "header",
        "footer",
        "ul",
        "ol",
        "dl",
        "menu",
        "form",
        "table",
        "span",
        "a",
        "center",
    ]
)
"""Elements that may be removed because of their class name or id."""
_RELATED = re.compile(
    r"(?:related|similar|recommended|popular|recent|more|further|latest|trending"
    r"|you (?:may|might) also).{0,40}"
    r"|(?:相关|相關|推荐|推薦|热门|熱門|最新|更多|猜你|延伸).{0,8}",
    re.IGNORECASE,
)
_SHARES = re.compile(
    r"(?:(?:share|tweet|pin|post|send|email|print|copy link|like|follow us)"
    r"(?: (?:this|on|to|via|it))*\W*)?"
    r"(?:facebook|twitter|x|linkedin|whatsapp|reddit|pinterest|telegram|tumblr|e-?mail|print"
    r"|instagram|youtube|line|weibo|wechat|rss|copy link|share|tweet"
    r"|微博|新浪微博|微信|朋友圈|QQ空间|QQ好友|QQ|豆瓣|知乎|复制链接|分享|打印|收藏)?",
    re.IGNORECASE,
)
_SHARE_HEADING = re.compile(r"(?:share|follow|分享).{0,20}", re.IGNORECASE)
_TRAIL = re.compile(
    r"\s*(?:当前位置|目前位置|您的位置|你的位置|您现在的位置|首页|home\b|you are here)"
    r".{0,100}[>»›→/／].{0,80}",
    re.IGNORECASE | re.DOTALL,
)
_ANCHORS = frozenset(["#", "¶", "§", "🔗"])
_COPYRIGHT = re.compile(
    r"\s*(?:©|\(c\)|copyright\b|版权所有|版權所有|all rights reserved)", re.IGNORECASE
)
_SHORT_BLOCK = 200
LISTS = ("ul", "ol", "dl", "menu")
_WRAPPERS = ("div", "section")
_MAX_WRAPPERS = 3  # maximum number of wrappers around a list that is their only content
_LONG_PARAGRAPH = 80  # characters from which a paragraph is prose without final punctuation
_SHORT_PARAGRAPH = 10
_SENTENCE_ENDS = frozenset(".!?:;…。！？：；\"'”’»」』)）")
MAX_MEASURED = 300
"""Bound on the measured text as a multiple of the page's text; ordinary pages need about ten."""
_COST = 100  # fixed cost of measuring one element, in characters
_LEFT: ContextVar[list[int]] = ContextVar("characters that may still be measured")


class _TooMuch(Exception):
    """The page exceeds the bound on measured text."""


_MAX_NAMED = 20_000  # maximum number of elements with a class or an id to check


def remove_unseen(body: Node) -> None:
    """Removes scripts, styles and hidden elements, so that only visible text is measured.

    Formulas are kept.
    """
    for node in _select(body, UNSEEN):
        if not (node.tag == "script" and (node.getattr("type") or "").startswith("math/tex")):
            _remove(node)
    for node in _select(body, ":is(h1, h2, h3, h4, h5, h6, dt) a"):
        if node.text.strip() in _ANCHORS:
            _remove(node)
    total = size(body)
    for node in _select(body, HIDDEN):
        formula = node if node.tag == "math" else node.query_selector("math")
        is_formula = formula is not None and size(formula) == size(node)
        if not is_formula and size(node) <= MAX_SHARE * total and not _holds(node, HEADS):
            _remove(node)


def main_part(body: Node) -> list[Node]:
    """Returns the elements whose concatenated text is the main text; removes boilerplate in them.

    The work is bounded: for a page with much text in hundreds of nested elements, removal stops at
    the bound and the body is returned.
    """
    token = _LEFT.set([MAX_MEASURED * (len(body.text or "") + 10_000)])
    try:
        return _main_part(body)
    except _TooMuch:
        return [body]
    finally:
        _LEFT.reset(token)


def _main_part(body: Node) -> list[Node]:
    remove_unseen(body)
    for node in _select(body, NAVIGATION):
        if not _holds(node, HEADS):
            _remove(node)
    total = size(body)
    _remove_sections(body, total)
    _remove_named(body, total)
    _remove_small_forms(body)
    _remove_link_groups(body)
    _remove_link_lists(body)
    return _roots(body, total)


def size(node: Node) -> int:
    """Returns the number of characters of an element's text, without white space."""
    text = node.text or ""
    left = _LEFT.get()
    left[0] -= len(text) + _COST
    if left[0] < 0:
        raise _TooMuch
    return sum(map(len, text.split()))


def link_share(node: Node) -> float:
    """Returns the share of an element's characters that are in links."""
    whole = size(node)
    return sum(size(link) for link in _select(node, "a")) / whole if whole else 0.0


def _roots(body: Node, total: int) -> list[Node]:
    """Returns the `<main>` element if it has enough of the page's text, else the body.

    If the `<h1>` is outside `<main>`, it is returned too.
    """
    mains = [node for node in _select(body, "main, [role=main]") if not _is_in(node, ("main",))]
    if len(mains) != 1 or size(mains[0]) < 0.3 * size(body) or not total:
        return [body]
    if _holds(mains[0], "h1"):
        return mains
    return [*_select(body, "h1")[:1], *mains]


def _may_go(node: Node, body: Node, total: int) -> bool:
    """Returns whether an element can be boilerplate.

    It must not contain the title, nor most of the page unless the content is mostly links.
    """
    if _holds(node, HEADS):
        return False
    return size(node) <= MAX_SHARE * total or (
        _holds(body, HEADS) and link_share(node) >= SOME_LINKS
    )


def _around_title(body: Node) -> Node:
    """Returns the smallest element around the title with most of the page's text.

    Returns None if that element is the body, or there is no title.
    """
    title = body.query_selector("h1")
    total = size(body)
    for node in _parents(title) if title is not None else ():
        if size(node) > MAX_SHARE * total:
            return None if node == body else node
    return None


def _remove_sections(body: Node, total: int) -> None:
    """Removes the page's headers, footers and asides; those of an article are part of its text."""
    around = _around_title(body)
    for node in _select(body, "header, footer, aside, [role=complementary]"):
        if not _may_go(node, body, total) or _is_in(node, QUOTES):
            continue
        is_inside = _is_in_text(node) or (around is not None and around.contains(node))
        links = link_share(node)
        if node.tag == "header":
            is_furniture = not is_inside and (links > SOME_LINKS or size(node) < _SHORT_BLOCK)
        else:
            is_furniture = not is_inside or links > SOME_LINKS or _is_copyright(node)
        if is_furniture:
            _remove(node)


def _remove_named(body: Node, total: int) -> None:
    """Removes elements whose class or id identifies them as boilerplate."""
    for node in _select(body, "[class], [id], [aria-label]")[:_MAX_NAMED]:
        words = f"{node.getattr('class') or ''} {node.getattr('id') or ''}".split()
        label = (node.getattr("aria-label") or "").split()
        names = [*words, *label[:1]]
        if node.tag not in _CONTAINERS or _is_named_by_heading(node):
            continue
        kinds = {kind for name in names if (kind := boilerplate_kind(name))}
        if not kinds:
            continue
        if "always" not in kinds and _is_in_flow(node):
            continue
        if kinds == {"if links"}:
            if link_share(node) < SOME_LINKS:
                continue
            if _is_in_text(node) and size(node) >= _SHORT_BLOCK:
                continue
        if (
            not _holds(node, HEADS)
            and size(node) <= MAX_SHARE * total
            and not _is_in(node, ("pre", "code"))
        ):
            _remove(node)


def _remove_small_forms(body: Node) -> None:
    """Removes forms to search, subscribe or log in, but not a form that wraps the entire page."""
    for node in _select(body, "form"):
        if (
            _holds(node, "input, textarea, select")
            and size(node) < _SHORT_BLOCK
            and not _holds(node, HEADS)
        ):
            _remove(node)


def _remove_link_lists(body: Node) -> None:
    """Removes lists that are menus, going by their content and position."""
    lists = [
        node for node in _select(body, "ul, ol, menu") if not _is_in(node, ("ul", "ol", "menu"))
    ]
    of_links = {node for node in lists if _is_of_links(node)}
    before_title = _before_title(body)
    headings = _select(body, "h1, h2, h3, h4, h5, h6")
    prose = size(body) - sum(map(size, of_links)) - sum(map(size, headings))
    is_about_lists = prose < LITTLE_PROSE * size(body)
    for node in lists:
        heading = _element_before(node)
        if _is_of_shares(node):
            if heading is not None and _SHARE_HEADING.fullmatch(heading.text.strip()):
                _remove(heading)
            _remove(node)
        elif node in before_title and link_share(node) >= SOME_LINKS:
            _remove(node)
        elif node not in of_links:
            continue
        elif (
            heading is not None
            and size(heading) < SHORT_ITEM
            and _RELATED.fullmatch(heading.text.strip().rstrip(":："))
        ):
            _remove(heading)
            _remove(node)
        elif not _is_in_text(node) and not is_about_lists and not _is_in_flow(node):
            _remove(node)


def _before_title(body: Node) -> set[Node]:
    """Returns the lists before the first `<h1>`; none if there is no `<h1>`."""
    found: set[Node] = set()
    for node in _select(body, "h1, ul, ol, menu"):
        if node.tag == "h1":
            return found
        found.add(node)
    return set()


def _remove_link_groups(body: Node) -> None:
    """Removes blocks of adjacent links, breadcrumb trails and copyright lines outside the text."""
    total = size(body)
    blocks: dict[Node, None] = {}
    for link in _select(body, "a"):
        parent = link.parent
        if parent is not None and parent.tag in ("div", "p", "td", "center", "span", "section"):
            blocks.setdefault(parent)
    groups = [node for node in blocks if _is_link_group(node)]
    prose = total - sum(map(size, groups))
    for node in groups:
        is_menu = not _is_in_text(node) and prose >= LITTLE_PROSE * total
        if (is_menu or _is_of_shares(node)) and not _holds(node, HEADS):
            _remove(node)
    for node in _select(body, "p, div, span, small, center, td"):
        if size(node) >= _SHORT_BLOCK or _holds(node, HEADS):
            continue
        is_trail = _holds(node, "a") and _TRAIL.fullmatch(node.text)
        if is_trail or (not _is_in_text(node) and _is_copyright(node)):
            _remove(node)


def _is_link_group(node: Node) -> bool:
    links = _select(node, "a")
    is_links = len(links) >= 3 and link_share(node) >= MENU_LINKS
    return is_links and size(node) <= SHORT_ITEM * len(links)


def _is_of_links(node: Node) -> bool:
    links = _select(node, "a")
    if len(links) < 2 or link_share(node) < SOME_LINKS:
        return False
    items = max(1, len(_select(node, "li")))
    # The last entry of a breadcrumb trail is often not a link
    return (
        link_share(node) >= (MENU_LINKS if items > 3 else SOME_LINKS)
        and size(node) <= SHORT_ITEM * items
    )


def _is_of_shares(node: Node) -> bool:
    links = _select(node, "a, button")
    return (
        len(links) >= 2
        and all(_SHARES.fullmatch(" ".join(link.text.split())) for link in links)
        and (size(node) - sum(map(size, links)) < SHORT_ITEM)
    )


def _is_in_flow(node: Node) -> bool:
    """Returns whether a list, or a block that contains only a list, is part of the flow of prose.

    It is if it is between two paragraphs of prose; within the main text, a list that is not mostly
    links may also just follow one.
    """
    if node.tag not in LISTS:
        inner = node.query_selector(", ".join(LISTS))
        if inner is None or size(inner) != size(node):
            return False
    for _ in range(_MAX_WRAPPERS):
        parent = node.parent
        if parent is None or parent.tag not in _WRAPPERS or size(parent) != size(node):
            break
        node = parent
    if not _is_prose(_element_before(node)):
        return False
    after = _element_after(node)
    return _is_prose(after) or (_is_in_text(node) and link_share(node) < SOME_LINKS)


def _is_prose(node: Node) -> bool:
    """Returns whether an element is a paragraph of sentences, or one that introduces a list."""
    if node is None or node.tag not in ("p", "blockquote"):
        return False
    text = node.text.strip()
    is_whole = size(node) >= _LONG_PARAGRAPH or (
        size(node) >= _SHORT_PARAGRAPH and text[-1] in _SENTENCE_ENDS
    )
    return is_whole and link_share(node) < SOME_LINKS and not _is_copyright(node)


def _is_named_by_heading(node: Node) -> bool:
    """Returns whether an element's id is derived from a heading in it, as site generators do.

    The id of a section about cookies does not make the section a cookie banner.
    """
    name = "".join(filter(str.isalnum, node.getattr("id") or "")).lower()
    heading = node.query_selector("h1, h2, h3, h4, h5, h6") if name else None
    return heading is not None and name in "".join(filter(str.isalnum, heading.text)).lower()


def _is_copyright(node: Node) -> bool:
    return _COPYRIGHT.match(node.text) is not None


def _is_in_text(node: Node) -> bool:
    return any(_is_text_part(parent) for parent in _parents(node))


def _is_text_part(node: Node) -> bool:
    return (
        node.tag in ("main", "article")
        or node.getattr("role") == "main"
        or node.getattr("itemprop") == "articleBody"
    )


def _is_in(node: Node, tags: Iterable[str]) -> bool:
    return any(parent.tag in tags for parent in _parents(node))


def _parents(node: Node) -> Iterator[Node]:
    node = node.parent
    while node is not None and node.type == 1:
        yield node
        node = node.parent


def _element_before(node: Node) -> Node:
    before = node.prev
    while before is not None and (before.type != 1 and not (before.value or "").strip()):
        before = before.prev
    return before if before is not None and before.type == 1 else None


def _element_after(node: Node) -> Node:
    after = node.next
    while after is not None and (after.type != 1 and not (after.value or "").strip()):
        after = after.next
    return after if after is not None and after.type == 1 else None


def _holds(node: Node, selector: str) -> bool:
    return node.query_selector(selector) is not None


def _select(node: Node, selector: str) -> list[Node]:
    found: list[Node] = node.query_selector_all(selector).values()
    return found


def _remove(node: Node) -> None:
    """Removes an element from its parent; does nothing if it has no parent any more."""
    if node.parent is not None:
        node.parent.remove_child(node)
