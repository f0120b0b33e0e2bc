"""Published chains of rules."""

from typing import Annotated, Literal

from pydantic import Field

from easyllm.data.clean.c4 import C4Quality
from easyllm.data.clean.chinese import CHINESE_STOP_WORDS, HanShare
from easyllm.data.clean.fineweb import FineWebQuality
from easyllm.data.clean.gopher import GopherQuality, GopherRepetition
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
    | HanShare,
    Field(discriminator="kind"),
]
"""Any rule: its `kind` names it, its fields are its bounds, `apply(view)` returns a view, perhaps of a rewritten text, or
the Violation that rejects it."""

PresetName = Literal["fineweb", "fineweb-zh", "gopher"]

_DUPLICATE_NGRAM_LIMITS_ZH = {5: 0.198, 6: 0.182, 7: 0.167, 8: 0.154, 9: 0.14, 10: 0.127}

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
    # FineWeb-2 (arXiv 2506.20920), its bounds for `cmn_Hani`, in its order. Those were set on segmented words of one to
    # two characters; a word is one character here, so the n-gram bounds are a little stricter, the others looser.
    "fineweb-zh": (
        Normalise(form="NFKC"),  # which folds full-width letters and digits
        LanguageIdentification(allowed=("zh",), min_score=0.692),
        HanShare(min_share=0.30),
        GopherRepetition(
            max_duplicate_paragraphs=None,
            max_duplicate_paragraph_characters=None,
            max_duplicate_lines=0.287,
            max_duplicate_line_characters=None,
            max_top_ngram_characters={2: 0.256, 3: 0.201, 4: 0.171},
            max_duplicate_ngram_characters=_DUPLICATE_NGRAM_LIMITS_ZH,
        ),
        FineWebQuality(
            min_punctuated_lines=0.106,
            max_short_lines=None,
            max_duplicate_line_characters=0.1,
            max_newlines_per_word=0.178,
        ),
        GopherQuality(
            min_mean_word_length=1,
            max_mean_word_length=5,
            min_alphabetic_words=0.735,
            stop_words=CHINESE_STOP_WORDS,
        ),
    ),
    "gopher": (
        Normalise(),
        LanguageIdentification(allowed=("en",), min_score=0.65),
        GopherRepetition(),
        GopherQuality(),
    ),
}
