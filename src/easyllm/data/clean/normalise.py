"""Repair and normalisation of a text's characters."""

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from easyllm.core.config import Config
from easyllm.core.errors import EasyllmError, install
from easyllm.data.clean.language import CHINESE, identify_language
from easyllm.data.clean.text import HAN, TextView

if TYPE_CHECKING:
    from ftfy import TextFixerConfig

CHINESE_PUNCTUATION = "，！？：；（）～…"
"""What compatibility folding would turn into Latin punctuation, which Chinese is not written with."""

Conversion = Literal["tw2s", "t2s", "hk2s"]
DEFAULT_CONVERSION: Conversion = "tw2s"
_HAN = re.compile(f"[{HAN}]")
_NOUN_WITH_ZHU = re.compile("[原編编土合專专譯译論论巨遺遗新舊旧拙所共主自撰校]著(?![\u8005])")
_ZHU = "\ue000"  # stands for 著 while OpenCC is at work

_FULL_WIDTH = {
    full: chr(full - 0xFEE0)
    for full in range(0xFF01, 0xFF5F)
    if chr(full) not in CHINESE_PUNCTUATION
}
_FULL_WIDTH_RUN = re.compile(f"[{''.join(map(chr, _FULL_WIDTH))}]+")
_OUTSIDE_CHINESE_PUNCTUATION = re.compile(f"[^{CHINESE_PUNCTUATION}]+")

# What ftfy's test for mojibake can match at all: two characters beyond ASCII in a row, or one of a few alone. That test
# is slow, and few lines of ordinary text hold either. An entity, an escape and a lone surrogate are mended too.
_MENDABLE = re.compile(
    "[\x1b\x80-\x9fÂÃŒœ\ud800-\udfff]"
    "|[\xa0-\u25ff\uf8ff\ufb01\ufb02\ufffd]{2}"
    "|&#?[0-9A-Za-z]{1,24};"
)  # fmt: skip
_LINE_BREAK = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
# C0 and C1 controls, soft hyphen, zero-width space, word joiner, byte order mark, directional overrides, interlinear
# marks and lone surrogates. The zero-width (non-)joiners stay: Persian, Indic scripts and emoji need them.
_CONTROL = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064"
    "\u2066-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
_ODD_SPACE = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_BLANK_LINES = re.compile(r"\n{3,}")


class Normalise(Config):
    """Mends broken characters and writes equal text equally; rejects nothing.

    Repair undoes mojibake and HTML entities with ftfy, as FineWeb-2 sets it: quotes, ligatures and widths stay.
    `form="NFKC"` and `fold_width` leave Chinese punctuation full-width.

    `simplify_chinese` turns traditional characters into simplified ones where the text is Chinese: the language is the
    document's where that is known, else it is identified, for Japanese shares the characters (漢字 would become 汉字).
    It names a conversion of OpenCC's: true is `tw2s`, since most traditional text is written as in Taiwan, where 看著 has
    the character that `t2s` and `hk2s` leave as it is (the simplified form is 看着), and other text comes out as by `t2s`.
    """

    kind: Literal["normalise"] = "normalise"
    repair: bool = True
    form: Literal["NFC", "NFKC"] | None = "NFC"
    fold_width: bool = False  # ＡＢＣ１２３ -> ABC123
    remove_control_characters: bool = True
    tidy_white_space: bool = True  # odd spaces, spaces at line ends, more than one blank line
    simplify_chinese: bool | Conversion = False  # True: tw2s

    @property
    def conversion(self) -> Conversion | None:
        """Which conversion `simplify_chinese` stands for."""
        return (
            DEFAULT_CONVERSION if self.simplify_chinese is True else self.simplify_chinese or None
        )

    def apply(self, view: TextView) -> TextView:
        text = view.text
        for step in self._steps(view.language):
            text = step(text)
        return view.with_text(text)

    def _steps(self, language: str | None) -> list[Callable[[str], str]]:
        def simplify(text: str) -> str:
            return simplify_if_chinese(text, language=language, conversion=self.conversion)

        steps: dict[Callable[[str], str], bool] = {
            repair_unicode: self.repair,
            remove_control_characters: self.remove_control_characters,
            normalise_nfc: self.form == "NFC",
            normalise_nfkc: self.form == "NFKC",
            fold_width: self.fold_width,
            simplify: self.conversion is not None,
            tidy_white_space: self.tidy_white_space,
        }
        return [step for step, is_wanted in steps.items() if is_wanted]


def repair_unicode(text: str) -> str:
    """`text` with mojibake, lost surrogates, terminal escapes and HTML entities mended, line by line.

    Entities stay where the text holds a "<": it may be markup on purpose.

    Raises:
        EasyllmError: the package `ftfy` is not installed.

    >>> repair_unicode("voilÃ\\xa0 le cafÃ©, l&eacute;ger")
    'voilà le café, léger'
    """
    if not _MENDABLE.search(text):
        return text
    fix, config = _fixer("<" not in text)
    lines = text.split("\n")
    return "\n".join(fix(line, config) if _MENDABLE.search(line) else line for line in lines)


def remove_control_characters(text: str) -> str:
    """`text` with every line break as "\\n" and without control and invisible formatting characters."""
    return _CONTROL.sub("", _LINE_BREAK.sub("\n", text))


def normalise_nfc(text: str) -> str:
    """`text` in Unicode's composed form: é is one character."""
    return unicodedata.normalize("NFC", text)


def normalise_nfkc(text: str) -> str:
    """`text` in Unicode's compatibility form (ﬁ -> fi, ① -> 1), but for Chinese punctuation.

    >>> normalise_nfkc("ＧＰＴ－４，不错！")
    'GPT-4，不错！'
    """
    if unicodedata.is_normalized("NFKC", text):
        return text
    return _OUTSIDE_CHINESE_PUNCTUATION.sub(_nfkc_of_match, text)


def fold_width(text: str) -> str:
    """`text` with full-width Latin letters, digits and symbols as ASCII, but for Chinese punctuation."""
    return text if text.isascii() else _FULL_WIDTH_RUN.sub(_narrowed, text)


def simplify_chinese(text: str, conversion: Conversion = DEFAULT_CONVERSION) -> str:
    """`text` with traditional Chinese characters as simplified ones, phrase by phrase.

    `tw2s` keeps the 著 of 著作 and 名著 and makes the others 着; where it takes a noun for a verb (原著, 土著), that is undone.

    Raises:
        EasyllmError: the package `opencc` is not installed.
    """
    if text.isascii():
        return text
    if conversion == "tw2s" and "著" in text:
        text = _NOUN_WITH_ZHU.sub(lambda match: match[0][0] + _ZHU, text)
        return _converter(conversion)(text).replace(_ZHU, "著")
    return _converter(conversion)(text)


def simplify_if_chinese(text: str, *, language: str | None, conversion: Conversion | None) -> str:
    """`simplify_chinese` where the text is in Chinese, which is identified where `language` is None."""
    if conversion is None or text.isascii() or not _HAN.search(text):
        return text
    if (language or identify_language(text)[0]) not in CHINESE:
        return text
    return simplify_chinese(text, conversion)


def tidy_white_space(text: str) -> str:
    """`text` with plain spaces, no space at line ends, at most one blank line in a row, and none at either end."""
    lines = _ODD_SPACE.sub(" ", text).split("\n")
    return _BLANK_LINES.sub("\n\n", "\n".join([line.rstrip() for line in lines])).strip("\n")


def _nfkc_of_match(match: re.Match[str]) -> str:
    return unicodedata.normalize("NFKC", match.group())


def _narrowed(match: re.Match[str]) -> str:
    return match.group().translate(_FULL_WIDTH)


@lru_cache(maxsize=2)
def _fixer(unescape: bool) -> "tuple[Callable[[str, TextFixerConfig], str], TextFixerConfig]":
    try:
        from ftfy import TextFixerConfig, fix_text
    except ImportError:
        raise _missing("repairing Unicode", "ftfy") from None
    return fix_text, TextFixerConfig(
        unescape_html=unescape,
        uncurl_quotes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        fix_line_breaks=False,
        remove_control_chars=False,  # a step of its own
        normalization=None,  # likewise
        explain=False,
    )


@lru_cache(maxsize=3)
def _converter(conversion: Conversion) -> Callable[[str], str]:
    try:
        from opencc import OpenCC
    except ImportError:
        raise _missing("converting traditional Chinese", "opencc") from None
    convert: Callable[[str], str] = OpenCC(conversion).convert
    return convert


def _missing(purpose: str, package: str) -> EasyllmError:
    return EasyllmError(
        f"{purpose} needs the package {package}, which is not installed; {install('data')}"
    )
