"""Presets: published chains of cleaning rules."""

from typing import Annotated, Literal

from pydantic import Field

from easyllm.corpus.clean.c4 import C4Quality
from easyllm.corpus.clean.chinese import CHINESE_STOP_WORDS, ChineseQuality, HanShare
from easyllm.corpus.clean.fineweb import FineWebQuality
from easyllm.corpus.clean.gopher import GopherQuality, GopherRepetition, NgramLimits
from easyllm.corpus.clean.language import LanguageIdentification
from easyllm.corpus.clean.length import DocumentLength
from easyllm.corpus.clean.normalise import Normalise

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
"""Any rule. `kind` is its name and its other fields are its thresholds; `apply(view)` returns a
view of the text, possibly rewritten, or the Violation that rejects it."""

PresetName = Literal["fineweb", "fineweb-zh", "gopher", "gopher-zh"]

# FineWeb-2's n-gram thresholds for `cmn_Hani` were set on segmented words of one to two characters.
# Here a word is one character, so orders and thresholds are set on characters instead: above the
# 99th percentile of clean paragraphs (docs/data.md), and with the length of a paragraph as the
# minimum denominator, for texts of one or two sentences. Also adapted are the minimum length; the
# share of alphabetic words, since punctuation is more frequent among characters than among words;
# and the number of stop words, since a sentence may have few.
_TOP_NGRAM_LIMITS_ZH: NgramLimits = {2: 0.2, 3: 0.2, 4: 0.22, 6: 0.2}
_DUPLICATE_NGRAM_LIMITS_ZH: NgramLimits = {6: 0.25, 8: 0.22, 10: 0.2, 12: 0.17, 14: 0.15, 16: 0.13}
_MIN_NGRAM_TEXT_ZH = 150
_MIN_PUNCTUATED_ZH = 8  # lines; four chat messages without a full stop are not a menu
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
    # arXiv 2406.17557, in the order of the paper
    "fineweb": (
        Normalise(),
        LanguageIdentification(allowed=("en",), min_score=0.65),
        GopherRepetition(),
        GopherQuality(),
        C4Quality(terminal_punctuation=False),
        FineWebQuality(),
    ),
    # FineWeb-2 (arXiv 2506.20920) with its thresholds for `cmn_Hani` and in its order, except for
    # the n-grams, plus rules that replace its language model and its word segmenter
    "fineweb-zh": (
        Normalise(form="NFKC"),  # also converts full-width letters and digits to ASCII
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
    # The Gopher rules for Chinese text with one article per line, where line ratios mean nothing
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
