"""Unicode repair and normalisation of text."""

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from easyllm.core.config import Config
from easyllm.core.errors import EasyllmError, install
from easyllm.corpus.clean.language import CHINESE, identify_language
from easyllm.corpus.clean.scripts import HAN
from easyllm.corpus.clean.text import TextView

if TYPE_CHECKING:
    from ftfy import TextFixerConfig

CHINESE_PUNCTUATION = "，！？：；（）～…"
"""Chinese punctuation that NFKC would wrongly convert to ASCII punctuation."""

Conversion = Literal["tw2s", "t2s", "hk2s"]
DEFAULT_CONVERSION: Conversion = "tw2s"
_HAN = re.compile(f"[{HAN}]")
_NOUN_WITH_ZHU = re.compile("[原編编土合專专譯译論论巨遺遗新舊旧拙所共主自撰校]著(?![\u8005])")
_ZHU = "\ue000"  # placeholder that protects 著 from OpenCC

_FULL_WIDTH = {
    full: chr(full - 0xFEE0)
    for full in range(0xFF01, 0xFF5F)
    if chr(full) not in CHINESE_PUNCTUATION
}
_FULL_WIDTH_RUN = re.compile(f"[{''.join(map(chr, _FULL_WIDTH))}]+")
_OUTSIDE_CHINESE_PUNCTUATION = re.compile(f"[^{CHINESE_PUNCTUATION}]+")

# A necessary condition for ftfy to change a line. Its mojibake test needs two consecutive non-ASCII
# characters or one of a few single ones; that test is slow, and few lines of ordinary text contain
# either. HTML entities, terminal escapes and lone surrogates are repaired too.
_MENDABLE = re.compile(
    "[\x1b\x80-\x9fÂÃŒœ\ud800-\udfff]"
    "|[\xa0-\u25ff\uf8ff\ufb01\ufb02\ufffd]{2}"
    "|&#?[0-9A-Za-z]{1,24};"
)  # fmt: skip
_LINE_BREAK = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
# C0 and C1 controls, soft hyphen, zero-width space, word joiner, byte order mark, directional
# overrides, interlinear marks and lone surrogates. The zero-width joiner and non-joiner stay,
# because Persian, Indic scripts and emoji need them.
_CONTROL = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064"
    "\u2066-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
_ODD_SPACE = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_BLANK_LINES = re.compile(r"\n{3,}")


class Normalise(Config):
    """Repairs broken characters and normalises equivalent ones to one form; rejects nothing.

    `repair` fixes mojibake and HTML entities with ftfy, configured as in FineWeb-2: quotes,
    ligatures and character widths are unchanged. `form="NFKC"` and `fold_width` leave Chinese
    punctuation full-width.

    `simplify_chinese` converts traditional characters to simplified ones if the text is Chinese.
    The language is that of the document if known, and identified otherwise, because Japanese uses
    the same characters (漢字 would become 汉字). The value names an OpenCC conversion. True means
    `tw2s`, because most traditional text follows the Taiwan standard, which writes 看著; `t2s` and
    `hk2s` leave that character unchanged (the simplified form is 看着). For other text, the result
    is the same as that of `t2s`.
    """

    kind: Literal["normalise"] = "normalise"
    repair: bool = Field(True, description="Repair mojibake and HTML entities.")
    form: Literal["NFC", "NFKC"] | None = Field(
        "NFC", description="Unicode normalization form; null leaves the text unchanged."
    )
    fold_width: bool = Field(
        False,
        description="Convert full-width letters and digits to ASCII (ＡＢＣ１２３ to ABC123).",
    )
    remove_control_characters: bool = Field(
        True, description="Remove control and invisible characters."
    )
    tidy_white_space: bool = Field(
        True,
        description="Replace non-ASCII spaces; remove trailing spaces and repeated blank lines.",
    )
    simplify_chinese: bool | Conversion = Field(
        False,
        description="Convert traditional to simplified characters in Chinese text, with the "
        "named OpenCC conversion; true means `tw2s`.",
    )

    @property
    def conversion(self) -> Conversion | None:
        """The OpenCC conversion that `simplify_chinese` selects; None for no conversion."""
        return (
            DEFAULT_CONVERSION if self.simplify_chinese is True else self.simplify_chinese or None
        )

    def apply(self, view: TextView) -> TextView:
        """Returns the view with the normalised text."""
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
    """Repairs mojibake, lone surrogates, terminal escapes and HTML entities, line by line.

    Entities are unchanged if the text contains a "<", since it may be intentional markup.

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
    """Converts all line breaks to "\\n" and removes control and invisible formatting characters."""
    return _CONTROL.sub("", _LINE_BREAK.sub("\n", text))


def normalise_nfc(text: str) -> str:
    """Returns `text` in Unicode's composed form NFC: é is one character."""
    return unicodedata.normalize("NFC", text)


def normalise_nfkc(text: str) -> str:
    """Returns `text` in compatibility form NFKC (ﬁ -> fi, ① -> 1), except Chinese punctuation.

    >>> normalise_nfkc("ＧＰＴ－４，不错！")
    'GPT-4，不错！'
    """
    if unicodedata.is_normalized("NFKC", text):
        return text
    return _OUTSIDE_CHINESE_PUNCTUATION.sub(_nfkc_of_match, text)


def fold_width(text: str) -> str:
    """Converts full-width letters, digits and symbols to ASCII, except Chinese punctuation."""
    return text if text.isascii() else _FULL_WIDTH_RUN.sub(_narrowed, text)


def simplify_chinese(text: str, conversion: Conversion = DEFAULT_CONVERSION) -> str:
    """Converts traditional Chinese characters to simplified ones, phrase by phrase.

    `tw2s` keeps the 著 of 著作 and 名著 and converts the others to 着. It misreads some nouns as
    verbs (原著, 土著); these are protected.

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
    """Applies `simplify_chinese` if the text is Chinese; returns other text unchanged.

    Args:
        text: the text.
        language: its language; None to identify it.
        conversion: the OpenCC conversion; None for no conversion.
    """
    if conversion is None or text.isascii() or not _HAN.search(text):
        return text
    if (language or identify_language(text)[0]) not in CHINESE:
        return text
    return simplify_chinese(text, conversion)


def tidy_white_space(text: str) -> str:
    """Normalises white space: plain spaces, no trailing spaces, at most one blank line in a row.

    Blank lines at the beginning and the end are removed.
    """
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
        remove_control_chars=False,  # done by remove_control_characters
        normalization=None,  # done by normalise_nfc and normalise_nfkc
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
