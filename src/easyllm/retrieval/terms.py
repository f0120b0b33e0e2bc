"""The terms of a text for BM25: words, and bigrams of characters in scripts without spaces.

"The Tea-Shop, 1905"    the tea shop 1905
"北京烤鸭 3"             北京 京烤 烤鸭 3
"""

import re
import unicodedata

from easyllm.corpus.clean.scripts import UNSPACED

_RUNS = re.compile(rf"[{UNSPACED}]+|[^\W_{UNSPACED}]+")


def terms(text: str) -> list[str]:
    """Returns the terms of `text` in order, normalised (NFKC) and in lower case.

    A run of Han characters or kana becomes its overlapping bigrams; a run of one character, that
    character (as Lucene's `CJKBigramFilter` does).

    >>> terms("Ｔea 北京烤鸭")
    ['tea', '北京', '京烤', '烤鸭']
    """
    found = list[str]()
    for run in _RUNS.findall(unicodedata.normalize("NFKC", text).casefold()):
        if len(run) > 1 and _is_unspaced(run):
            found += (run[i : i + 2] for i in range(len(run) - 1))
        else:
            found.append(run)
    return found


def _is_unspaced(run: str) -> bool:
    return _UNSPACED.match(run) is not None


_UNSPACED = re.compile(rf"[{UNSPACED}]")

__all__ = ["terms"]
