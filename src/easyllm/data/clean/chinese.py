"""What Chinese text needs beside the other rules: its share of Han characters, its stop words."""

import re
from typing import Literal

from easyllm.core.config import Config
from easyllm.data.clean.text import HAN, TextView
from easyllm.data.clean.violation import Figure, Fraction, Violation, first_violation, ratio

CHINESE_STOP_WORDS = tuple("的年在月是和日了於·為有被人中为他與後也而由于与后")
"""FineWeb-2's for Mandarin (`cmn_Hani`), and the simplified forms of 於, 與 and 後."""

_NOT_HAN = re.compile(f"[^{HAN}]+")


class HanShare(Config):
    """Rejects texts of which too little is written in Han characters; white space is not counted."""

    kind: Literal["han_share"] = "han_share"
    min_share: Fraction = 0.30

    def apply(self, view: TextView) -> TextView | Violation:
        characters = sum(map(len, view.text.split()))
        share = ratio(len(_NOT_HAN.sub("", view.text)), characters)
        return first_violation(self.kind, [Figure("share", share, low=self.min_share)]) or view
