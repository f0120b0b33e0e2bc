"""Scripts that are written without spaces between words."""

import re

HAN = "々〇\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Han characters, for use inside `[]` in a regular expression."""
UNSPACED = HAN + "\u3040-\u30ff"
"""Han characters and kana, for use inside `[]` in a regular expression."""
UNSPACED_CHARACTER = re.compile(f"[{UNSPACED}]")


def is_unspaced(word: str) -> bool:
    """Returns whether a word is in a script that is written without spaces.

    >>> is_unspaced("茶"), is_unspaced("tea")
    (True, False)
    """
    return UNSPACED_CHARACTER.match(word) is not None
