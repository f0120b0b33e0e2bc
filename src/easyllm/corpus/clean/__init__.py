"""Document cleaning: language identification, quality filters, repetition filters, normalisation.

The presets are published filter pipelines (FineWeb, Gopher) and variants of them for Chinese.
"""

from easyllm.corpus.clean.c4 import C4Quality
from easyllm.corpus.clean.chinese import ChineseQuality, HanShare
from easyllm.corpus.clean.fineweb import FineWebQuality
from easyllm.corpus.clean.gopher import GopherQuality, GopherRepetition
from easyllm.corpus.clean.language import LanguageIdentification, identify_language
from easyllm.corpus.clean.length import DocumentLength
from easyllm.corpus.clean.normalise import Normalise
from easyllm.corpus.clean.pipeline import CleanConfig, Cleaner, CleanReport
from easyllm.corpus.clean.presets import PRESETS, PresetName, Rule
from easyllm.corpus.clean.text import TextView
from easyllm.corpus.clean.violation import Violation

__all__ = [
    "PRESETS",
    "C4Quality",
    "ChineseQuality",
    "CleanConfig",
    "CleanReport",
    "Cleaner",
    "DocumentLength",
    "FineWebQuality",
    "GopherQuality",
    "GopherRepetition",
    "HanShare",
    "LanguageIdentification",
    "Normalise",
    "PresetName",
    "Rule",
    "TextView",
    "Violation",
    "identify_language",
]
