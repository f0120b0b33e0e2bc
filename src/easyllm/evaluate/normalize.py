"""Normal forms in which answers are compared, for English, Chinese and mixed text.

SQuAD's script (Rajpurkar et al. 2016, arXiv 1606.05250) lowercases, removes ASCII punctuation and
English articles. It does not fit Chinese, whose punctuation is not ASCII and whose words are not
separated, nor numbers: -5 equals 5 and 3.5 equals 35 there. Here, NFKC comes first, all Unicode
punctuation is removed except the sign and the point of a number, and every Han character is a
token (as in CMRC 2018, arXiv 1810.07366).
"""

import re
import unicodedata
from functools import lru_cache

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
KANA = "\u3040-\u30ff"
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_IN_NUMBER = re.compile(r"(?<!\w)-(?=\d)|(?<=\d)\.(?=\d)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_TOKEN = re.compile(rf"[{HAN}{KANA}]|[^\W{HAN}{KANA}]+(?:\.\d+)?|-\d+(?:\.\d+)?")
_KEPT = {"-": "\ue000", ".": "\ue001"}


def normalize_answer(text: str) -> str:
    """Returns the form of an answer that exact match compares.

    >>> normalize_answer("The −3.5 °C,  Paris!"), normalize_answer("“北京”，2024年。")
    ('-3.5 c paris', '北京 2024年')
    """
    text = unicodedata.normalize("NFKC", text).replace("−", "-").lower()
    text = _IN_NUMBER.sub(lambda found: _KEPT[found[0]], _THOUSANDS.sub("", text))
    text = "".join(" " if _is_mark(char) else char for char in text)
    for mark, kept in _KEPT.items():
        text = text.replace(kept, mark)
    return " ".join(_ARTICLES.sub(" ", text).split())


def answer_tokens(text: str) -> list[str]:
    """Returns the tokens of a normalized answer: words, numbers, single Han characters and kana.

    >>> answer_tokens("在 Paris 的 −3.5 度")
    ['在', 'paris', '的', '-3.5', '度']
    """
    return _TOKEN.findall(normalize_answer(text))


def has_han(text: str) -> bool:
    """Whether a text has a Han character or kana, which are not separated by spaces."""
    return re.search(f"[{HAN}{KANA}]", text) is not None


@lru_cache(maxsize=4096)
def _is_mark(char: str) -> bool:
    """Whether a character is punctuation or a symbol."""
    return unicodedata.category(char)[0] in "PS"


__all__ = ["HAN", "KANA", "answer_tokens", "has_han", "normalize_answer"]
