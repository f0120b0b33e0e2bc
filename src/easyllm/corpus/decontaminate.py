"""Decontamination: rejects documents that share a 13-gram of words with an evaluation set.

Source: Brown et al. 2020, arXiv 2005.14165, appendix C.

Words are those of `dedup.words`: case, punctuation and white space are ignored, and a Han character
or kana is a word. A Han character carries about two thirds of the information of a word, so n-grams
of texts that are mostly Han are 1.5 times as long (20). An evaluation text shorter than the n-gram
size is matched in full; one of fewer than 8 words (12 Han characters) would match unrelated
documents, so it is skipped, but counted.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, model_validator

from easyllm.core.atomic import atomic_directory, write_json
from easyllm.core.config import Config
from easyllm.corpus.dedup.ragged import U64
from easyllm.corpus.dedup.words import HAN, Windows, WordHasher, mix, word_spans, words
from easyllm.corpus.document import Document, Rejection

HAN_FACTOR = 1.5
_HAN_WORD = re.compile(f"[{HAN}]")


class DecontaminationConfig(Config):
    """The n-gram sizes used for decontamination, in words."""

    ngram_size: PositiveInt = Field(
        13,
        description="Size, in words, of the n-grams of evaluation texts of at least that many "
        "words; shorter texts are matched in full.",
    )
    min_words: PositiveInt = Field(8, description="Evaluation texts with fewer words are skipped.")

    @model_validator(mode="after")
    def _whole_texts_are_shorter_than_runs(self) -> "DecontaminationConfig":
        if self.min_words > self.ngram_size:
            raise ValueError(
                f"min_words={self.min_words} exceeds ngram_size={self.ngram_size}; "
                f"set min_words to {self.ngram_size} or less"
            )
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Decontaminator:
    """Index of the n-grams of evaluation texts; small enough to send to every worker.

    Attributes:
        runs: n-gram size -> the hashes of all n-grams of that size, ascending, and the index of the
            evaluation set of each.
        names: names of the evaluation sets.
        num_passed_over: number of evaluation texts that are too short and were skipped, by set.
        hasher: caches the hashes of words across documents.
    """

    runs: dict[int, tuple[U64, NDArray[np.int64]]]
    names: tuple[str, ...]
    num_passed_over: dict[str, int]
    hasher: WordHasher = field(default_factory=WordHasher, repr=False, compare=False)

    @classmethod
    def from_texts(
        cls,
        evaluation: Mapping[str, Iterable[str]],
        config: DecontaminationConfig | None = None,
    ) -> "Decontaminator":
        """Builds the index of all n-grams of the evaluation sets.

        Args:
            evaluation: name of the set -> its texts.
            config: the n-gram sizes.
        """
        config = config or DecontaminationConfig()
        hasher = WordHasher()
        found: dict[int, list[tuple[U64, int]]] = {}
        passed_over = dict.fromkeys(evaluation, 0)
        for number, (name, texts) in enumerate(evaluation.items()):
            for text in texts:
                size = _run_size(text, config)
                if size is None:
                    passed_over[name] += 1
                    continue
                runs = mix(Windows(hasher.hashes(text)).hashes(size))
                found.setdefault(size, []).append((runs, number))
        return cls(
            runs={size: _sorted(parts) for size, parts in sorted(found.items())},
            names=tuple(evaluation),
            num_passed_over=passed_over,
        )

    def save(self, folder: Path) -> None:
        """Writes the index into a new folder, from which workers load it."""
        with atomic_directory(folder, replace=True) as work:
            write_json(
                work / "sets.json", {"names": self.names, "num_passed_over": self.num_passed_over}
            )
            for size, (runs, sets) in self.runs.items():
                np.save(work / f"runs-{size}.npy", runs)
                np.save(work / f"sets-{size}.npy", sets)

    @classmethod
    def load(cls, folder: Path) -> "Decontaminator":
        """Loads the index that `save` wrote."""
        described = json.loads((folder / "sets.json").read_text("utf-8"))
        sizes = sorted(int(path.stem.split("-")[1]) for path in folder.glob("runs-*.npy"))
        arrays = {
            size: tuple(
                np.load(folder / f"{kind}-{size}.npy", allow_pickle=False)
                for kind in ("runs", "sets")
            )
            for size in sizes
        }
        return cls(
            runs={size: (runs, sets) for size, (runs, sets) in arrays.items()},
            names=tuple(described["names"]),
            num_passed_over=described["num_passed_over"],
        )

    def check(self, document: Document) -> Rejection | None:
        """Returns a rejection if the document contains an n-gram of an evaluation set, else None.

        The rule is `decontamination:` followed by the name of the set; the value is the matching
        passage of the document.
        """
        windows = Windows(self.hasher.hashes(document.text))
        for size, (runs, sets) in self.runs.items():
            hashes = mix(windows.hashes(size))
            place = np.minimum(np.searchsorted(runs, hashes), len(runs) - 1)
            hits = np.flatnonzero(runs[place] == hashes)
            if len(hits):
                first = int(hits[0])
                spans = word_spans(document.text)
                return Rejection(
                    document=document,
                    rule=f"decontamination:{self.names[sets[place[first]]]}",
                    value=document.text[spans[first][0] : spans[first + size - 1][1]],
                )
        return None


def _run_size(text: str, config: DecontaminationConfig) -> int | None:
    """Returns the n-gram size for an evaluation text, or None if the text is too short."""
    found = words(text)
    han = sum(_HAN_WORD.match(word) is not None for word in found)
    factor = HAN_FACTOR if 2 * han > len(found) else 1
    if len(found) < config.min_words * factor:
        return None
    return min(len(found), math.ceil(config.ngram_size * factor))


def _sorted(parts: list[tuple[U64, int]]) -> tuple[U64, NDArray[np.int64]]:
    """Returns the distinct n-gram hashes, ascending, each with the first set that contains it."""
    numbers = np.repeat([number for _, number in parts], [len(runs) for runs, _ in parts])
    runs, first = np.unique(np.concatenate([runs for runs, _ in parts]), return_index=True)
    return runs, numbers[first]
