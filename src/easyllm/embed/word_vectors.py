"""Word vectors: neighbours, analogies, and their folder on disk.

A folder contains `vectors.npy` [V, dim] fp32 and `words.txt`, one word per line.
"""

import unicodedata
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from easyllm.core.atomic import atomic_directory
from easyllm.core.errors import CheckpointError, ConfigError, suggest
from easyllm.corpus.dedup.words import words

Array = np.ndarray[Any, Any]
VECTORS, WORDS = "vectors.npy", "words.txt"


def words_of(text: str) -> list[str]:
    """Returns the words of a text in lower case; each Han character or kana is a word.

    >>> words_of("Green Tea, 绿茶")
    ['green', 'tea', '绿', '茶']
    """
    return words(unicodedata.normalize("NFKC", text).casefold())


@dataclass(frozen=True)
class WordVectors:
    """Words with a vector each.

    Attributes:
        words: the words, most frequent first.
        vectors: [V, dim] fp32.
    """

    words: tuple[str, ...]
    vectors: Array

    @cached_property
    def _unit(self) -> Array:
        lengths = np.linalg.norm(self.vectors, axis=1, keepdims=True)
        found: Array = self.vectors / np.maximum(lengths, 1e-12)
        return found

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}

    def number(self, word: str) -> int:
        """Returns the number of a word.

        Raises:
            ConfigError: it has no vector.
        """
        if word not in self._numbers:
            raise ConfigError(
                f"the word {word!r} has no vector{suggest(word, self.words)}; it was rare in the "
                "training text, or absent"
            )
        return self._numbers[word]

    def neighbours(
        self, plus: list[str], minus: list[str] | None = None, k: int = 10
    ) -> list[tuple[str, float]]:
        """Returns the words with the largest cosine with a sum of words, without these words.

        `plus=["king", "woman"], minus=["man"]` is the analogy man : king = woman : ?
        (Mikolov et al. 2013, arXiv 1301.3781, section 4).

        Args:
            plus: words whose unit vectors are added.
            minus: words whose unit vectors are subtracted.
            k: how many neighbours.

        Raises:
            ConfigError: a word has no vector, or no word is given.
        """
        if not plus:
            raise ConfigError("no word to search for; give at least one")
        added = [self.number(word) for word in plus]
        removed = [self.number(word) for word in minus or ()]
        target = self._unit[added].sum(0) - self._unit[removed].sum(0)
        scores = self._unit @ (target / max(float(np.linalg.norm(target)), 1e-12))
        scores[[*added, *removed]] = -np.inf
        order = np.argsort(-scores, kind="stable")[:k]
        return [(self.words[i], float(scores[i])) for i in order if np.isfinite(scores[i])]

    def save(self, folder: Path) -> None:
        """Writes a folder atomically.

        Raises:
            OutputError: the folder is not empty, or cannot be written.
        """
        with atomic_directory(folder) as work:
            np.save(work / VECTORS, self.vectors)
            (work / WORDS).write_text("".join(f"{w}\n" for w in self.words), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "WordVectors":
        """Reads a folder.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        try:
            names = tuple((folder / WORDS).read_text(encoding="utf-8").splitlines())
            vectors = np.load(folder / VECTORS)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{folder} contains no word vectors ({error}); train them: easyllm embed train"
            ) from None
        if vectors.ndim != 2 or len(vectors) != len(names):
            raise CheckpointError(
                f"{folder} has {len(names)} words but vectors of shape {list(vectors.shape)}; "
                "train them again"
            )
        return cls(names, vectors)


def has_word_vectors(folder: Path) -> bool:
    """Whether a folder contains word vectors."""
    return (folder / WORDS).is_file()


__all__ = ["WordVectors", "has_word_vectors", "words_of"]
