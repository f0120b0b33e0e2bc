"""Published chains of rules."""

from typing import Annotated, Literal

from pydantic import Field

from easyllm.data.clean.c4 import C4Quality
from easyllm.data.clean.chinese import CHINESE_STOP_WORDS, ChineseQuality, HanShare
from easyllm.data.clean.fineweb import FineWebQuality
from easyllm.data.clean.gopher import GopherQuality, GopherRepetition, NgramLimits
from easyllm.data.clean.language import LanguageIdentification
from easyllm.data.clean.length import DocumentLength
from easyllm.data.clean.normalise import Normalise

Rule = Annotated[
    Normalise
    | LanguageIdentification
    | DocumentLength
    | GopherRepetition
    | GopherQuality
    | C4Quality
    | FineWebQuality
    | HanShare
    | ChineseQuality,
    Field(discriminator="kind"),
]
"""Any rule: its `kind` names it, its fields are its bounds, `apply(view)` returns a view, perhaps of a rewritten text, or
the Violation that rejects it."""

PresetName = Literal["fineweb", "fineweb-zh", "gopher", "gopher-zh"]

# FineWeb-2's n-gram bounds for `cmn_Hani` were set on segmented words of one to two characters. A word is one character here,
# so orders and bounds are set on characters instead, above what 99 of 100 clean paragraphs reach (docs/data.md), and for
# texts of a sentence or two on as many characters as a paragraph has. So are the least length; the share of words with a
# letter, of which punctuation is more of among characters than among words; and the stop words, which a sentence may lack.
_TOP_NGRAM_LIMITS_ZH: NgramLimits = {2: 0.2, 3: 0.2, 4: 0.22, 6: 0.2}
_DUPLICATE_NGRAM_LIMITS_ZH: NgramLimits = {6: 0.25, 8: 0.22, 10: 0.2, 12: 0.17, 14: 0.15, 16: 0.13}
_MIN_NGRAM_TEXT_ZH = 150
_MIN_PUNCTUATED_ZH = 8  # lines: four messages of a chat without a full stop are no menu
_QUALITY_ZH = GopherQuality(
    min_words=40,
    min_mean_word_length=1,
    max_mean_word_length=5,
    min_alphabetic_words=0.6,
    stop_words=CHINESE_STOP_WORDS,
    min_stop_words=1,
    min_lines=4,
)

PRESETS: dict[PresetName, tuple[Rule, ...]] = {
    # arXiv 2406.17557, in its order
    "fineweb": (
        Normalise(),
        LanguageIdentification(allowed=("en",), min_score=0.65),
        GopherRepetition(),
        GopherQuality(),
        C4Quality(terminal_punctuation=False),
        FineWebQuality(),
    ),
    # FineWeb-2 (arXiv 2506.20920), its bounds for `cmn_Hani`, in its order, but for the n-grams; and rules for what its
    # language model and its segmenter would find.
    "fineweb-zh": (
        Normalise(form="NFKC"),  # which folds full-width letters and digits
        LanguageIdentification(allowed=("zh",), min_score=0.692),
        HanShare(min_share=0.30),
        ChineseQuality(),
        GopherRepetition(
            max_duplicate_paragraphs=None,
            max_duplicate_paragraph_characters=None,
            max_duplicate_lines=0.287,
            max_duplicate_line_characters=None,
            max_top_ngram_characters=_TOP_NGRAM_LIMITS_ZH,
            max_duplicate_ngram_characters=_DUPLICATE_NGRAM_LIMITS_ZH,
            min_ngram_text=_MIN_NGRAM_TEXT_ZH,
        ),
        FineWebQuality(
            min_punctuated_lines=0.106,
            max_short_lines=None,
            max_duplicate_line_characters=0.1,
            max_newlines_per_word=0.178,
            min_lines=_MIN_PUNCTUATED_ZH,
        ),
        _QUALITY_ZH,
    ),
    "gopher": (
        Normalise(),
        LanguageIdentification(allowed=("en",), min_score=0.65),
        GopherRepetition(),
        GopherQuality(),
    ),
    # the same for Chinese: for text without a shape of lines, an article a line
    "gopher-zh": (
        Normalise(form="NFKC"),
        LanguageIdentification(allowed=("zh",), min_score=0.65),
        HanShare(min_share=0.30),
        ChineseQuality(),
        GopherRepetition(
            max_top_ngram_characters=_TOP_NGRAM_LIMITS_ZH,
            max_duplicate_ngram_characters=_DUPLICATE_NGRAM_LIMITS_ZH,
            min_ngram_text=_MIN_NGRAM_TEXT_ZH,
        ),
        _QUALITY_ZH,
    ),
}
