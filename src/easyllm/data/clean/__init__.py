"""Document cleaning: language identification, quality filters, repetition filters, normalisation.

The presets are published filter pipelines (FineWeb, Gopher) and variants of them for Chinese.
"""

from easyllm.data.clean.c4 import C4Quality
from easyllm.data.clean.chinese import ChineseQuality, HanShare
from easyllm.data.clean.fineweb import FineWebQuality
from easyllm.data.clean.gopher import GopherQuality, GopherRepetition
from easyllm.data.clean.language import LanguageIdentification, identify_language
from easyllm.data.clean.length import DocumentLength
from easyllm.data.clean.normalise import Normalise
from easyllm.data.clean.pipeline import CleanConfig, Cleaner, CleanReport
from easyllm.data.clean.presets import PRESETS, PresetName, Rule
from easyllm.data.clean.text import TextView
from easyllm.data.clean.violation import Violation

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
