"""Splits texts into words and hashes them, identically in every process and on every platform.

A word is a run of letters and digits; a Han character or kana is a word by itself, so that Chinese
and Japanese need no word segmenter. Hashes ignore case, width (NFKC) and everything between words.
Texts should be in NFC: a separate combining mark splits a word.
"""

import re
import unicodedata
from hashlib import blake2b
from typing import Literal

import numpy as np

from easyllm.corpus.dedup.ragged import U64

HAN = "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Characters that count as words: Han with extensions, iteration marks, kana; for use in `[]`."""

_WORD = re.compile(f"[{HAN}]|[^\\W_{HAN}]+")
_ASCII_WORD = re.compile("[0-9A-Za-z]+")  # a third faster, for most texts of an English corpus
_MAX_CACHED = 1 << 20

_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_INVERSE = pow(_BASE, -1, 1 << 64)


def words(text: str) -> list[str]:
    """Returns the words of a text, as written."""
    return (_ASCII_WORD if text.isascii() else _WORD).findall(text)


def word_spans(text: str) -> list[tuple[int, int]]:
    """Returns the (start, end) of each of `words(text)`."""
    return [match.span() for match in _WORD.finditer(text)]


def digest(text: str, size: int) -> int:
    """Returns the BLAKE2b hash of a text as an integer of `size` bytes."""
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(data, digest_size=size).digest(), "little")


class WordHasher(dict[str, int]):
    """Cache of word hashes, each computed on first use."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _MAX_CACHED:
            self.clear()
        value = self[word] = digest(unicodedata.normalize("NFKC", word).casefold(), 8)
        return value

    def __reduce__(self) -> tuple[type["WordHasher"], tuple[()]]:
        return WordHasher, ()  # pickled without its cached hashes

    def hashes(self, text: str, unit: Literal["word", "character"] = "word") -> U64:
        """Returns [n] uint64, the hash of each word, or of each character of the words."""
        found = words(text)
        if unit == "character":
            letters = unicodedata.normalize("NFKC", "".join(found)).casefold()
            codes = np.frombuffer(letters.encode("utf-32-le", "surrogatepass"), "<u4")
            return mix(codes.astype(np.uint64))
        return np.array(list(map(self.__getitem__, found)), dtype=np.uint64)


def mix(values: U64) -> U64:
    """Hashes 64-bit integers bijectively, with avalanche (the finalizer of MurmurHash3)."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))


class Windows:
    """Rolling hashes of all windows of consecutive tokens, of any size, from one pass.

    The hash of tokens t[i:i+s] is the polynomial Σ t[i+k] B^k modulo 2^64 (Karp & Rabin 1987). It
    is computed as a difference of prefix sums: two operations per window of any size.

    Args:
        tokens: [n] uint64, the hashes of the tokens.
    """

    def __init__(self, tokens: U64) -> None:
        powers = np.full(len(tokens), _BASE, np.uint64)
        inverses = np.full(len(tokens), _INVERSE, np.uint64)
        powers[:1] = inverses[:1] = 1
        self._inverses = np.cumprod(inverses, dtype=np.uint64)
        self._sums = np.zeros(len(tokens) + 1, np.uint64)
        np.cumsum(tokens * np.cumprod(powers, dtype=np.uint64), out=self._sums[1:])

    def __reduce__(self) -> tuple[type["WordHasher"], tuple[()]]:
        return WordHasher, ()

    def hashes(self, size: int) -> U64:
        """Returns [max(n - size + 1, 0)] uint64, the hash of each window of `size` tokens."""
        if size >= len(self._sums):
            return np.empty(0, np.uint64)
        sums = self._sums[size:] - self._sums[: len(self._sums) - size]
        return sums * self._inverses[: len(sums)]
