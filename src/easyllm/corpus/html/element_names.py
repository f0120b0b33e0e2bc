"""Classifies class names and ids of HTML elements: boilerplate, perhaps boilerplate, or unknown."""

import re
from functools import lru_cache

_PLACES = (
    "site page main left right top bottom global post entry article single content sticky "
    "floating side mobile desktop header footer js wp block widget section inner outer the "
    "primary secondary button buttons btn btns link links icon icons bar box list item items "
    "posts articles widgets container wrapper wrap tool tools media menu nav area banner notice "
    "popup modal message overlay form cta panel news reading stories pages topics products videos "
    "unit slot label trail fixed dark light col column row info text title enabled clearfix"
)
_ALWAYS = (
    "breadcrumb breadcrumbs crumb crumbs sidebar sidenav footer foot cookie cookies gdpr consent "
    "cookieconsent cookielaw share sharing sharethis addtoany social related recommend "
    "recommended recommendation recommendations pagination pager sharedaddy editsection "
    "newsletter subscribe advert adverts advertisement advertising ad ads sponsored promo popup "
    "modal copyright skiplink daohang mianbaoxie guanggao fenxiang xiangguan"
)
_IF_LINKS = (
    "nav navbar navigation topnav mainnav subnav sidenav footnav menu menubar mainmenu submenu "
    "topmenu topbar toolbar header masthead toc tag tags widget widgets link links tab tabs side "
    "dropdown category categories archive archives prev next prevnext postnav language languages "
    "catlinks path position location"
)
"""Words that classify a class name if all its other words are in these lists too: `share-buttons`
is a group of buttons, `share-price` is content."""
_KNOWN_PAIRS = frozenset(
    ["sr only", "screen reader text", "visually hidden", "skip link", "skip to content"]
)
_OF_PLACES = frozenset(["sidebar", "sidenav", "footer", "foot"])
"""Words of `_ALWAYS` that describe the position of an element, not what it is."""
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+")
_MAX_NAME = 60
_PREFIX = 2
_ALWAYS_WORDS = frozenset(_ALWAYS.split())
_IF_LINKS_WORDS = frozenset(_IF_LINKS.split())
_EVERY_WORD = _ALWAYS_WORDS | _IF_LINKS_WORDS | frozenset(_PLACES.split())


@lru_cache(maxsize=4096)
def boilerplate_kind(name: str) -> str | None:
    """Classifies a class name or an id.

    Returns:
        `always` for boilerplate, `by place` for boilerplate because of its position, `if links` for
        boilerplate if the element consists mostly of links, or None.

    >>> furniture_kind("share-buttons"), furniture_kind("mainMenu"), furniture_kind("share-price")
    ('always', 'if links', None)
    """
    words = [word.lower() for word in _WORD.findall(name)] if len(name) <= _MAX_NAME else []
    if " ".join(words) in _KNOWN_PAIRS:
        return "always"
    words = [word for word in words if not word.isdigit()]
    if len(words) > 1 and len(words[0]) <= _PREFIX and words[0] not in _EVERY_WORD:
        del words[0]  # prefix of a theme: bd-breadcrumbs, mw-editsection
    if not words or not all(word in _EVERY_WORD for word in words):
        return None
    always = [word for word in words if word in _ALWAYS_WORDS]
    if always:
        return "by place" if _OF_PLACES.issuperset(always) else "always"
    return "if links" if any(word in _IF_LINKS_WORDS for word in words) else None
