"""What counts as a repetition, a variant for each method; `kind` tells them apart."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from easyllm.core.config import Config
from easyllm.core.errors import ConfigError, suggest


class ExactConfig(Config):
    """Documents with the same text; the first is kept.

    `normalize`: case, runs of white space and Unicode composition do not count; punctuation does (a+b is not a-b).
    """

    kind: Literal["exact"] = "exact"
    normalize: bool = True


class ParagraphConfig(Config):
    """Paragraphs that occurred before, in any document, are cut out (CCNet, arXiv 1911.00359, section 3.1).

    Attributes:
        unit: `paragraph` is what blank lines separate, `line` a line.
        min_words: shorter ones (headings, "Yes.") are left alone.
    """

    kind: Literal["paragraph"] = "paragraph"
    unit: Literal["paragraph", "line"] = "paragraph"
    min_words: PositiveInt = 5


class SubstringConfig(Config):
    """Runs of at least `min_words` words that occurred before, anywhere, are cut out (Lee et al. 2021, arXiv 2107.06499).

    A Han character or kana counts as a word.
    """

    kind: Literal["substring"] = "substring"
    min_words: Annotated[int, Field(ge=2)] = 50


class MinHashConfig(Config):
    """Documents whose sets of shingles are nearly the same; the first is kept.

    Candidates share all `rows` minima of at least one of the `bands` (Broder 1997; Leskovec et al., Mining of Massive
    Datasets, section 3.4); each is checked by the exact Jaccard similarity, so that bands decide what is found and
    never what is removed. 20 bands of 5 rows find 99.96% of the pairs at 0.8, FineWeb's 14 of 8 find 92%.

    Attributes:
        threshold: least Jaccard similarity of a removed document with the kept one.
        unit: `word` (a Han character or kana counts as a word) or `character`, of the words' letters and digits.
        shingle_size: units in a shingle. One changed word changes `shingle_size` shingles: in 100 words, 2 changes
            leave 5-word shingles at Jaccard 0.81, and 3-word shingles at 0.88. With 3 (the default) every pair of
            longer texts at 0.8 in 5-word shingles is above 0.8 too, and scattered changes that bring it down to 0.8
            leave 5-word shingles above 0.65.
        seed: of the hash functions.
        max_bucket: kept documents one bucket remembers. It bounds the work on masses of similar, not near-duplicate
            pages (a shop's template): only there a pair may be missed by it.
    """

    kind: Literal["minhash"] = "minhash"
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.8
    bands: PositiveInt = 20
    rows: PositiveInt = 5
    unit: Literal["word", "character"] = "word"
    shingle_size: PositiveInt = 3
    seed: NonNegativeInt = 1
    max_bucket: PositiveInt = 256

    @model_validator(mode="after")
    def _bands_reach_the_threshold(self) -> "MinHashConfig":
        found = collision_probability(self.threshold, self.bands, self.rows)
        if found < 0.5:
            raise ValueError(
                f"bands={self.bands} of rows={self.rows} find {found:.0%} of the pairs at threshold="
                f"{self.threshold}, expected at least half; set fewer rows or more bands"
            )
        return self


def collision_probability(similarity: float, bands: int, rows: int) -> float:
    """Probability that a pair becomes a candidate: 1 - (1 - s^r)^b.

    >>> [round(collision_probability(s, 20, 5), 4) for s in (0.5, 0.8)]
    [0.4701, 0.9996]
    """
    return float(1 - (1 - similarity**rows) ** bands)


DedupStep = Annotated[
    ExactConfig | ParagraphConfig | SubstringConfig | MinHashConfig, Field(discriminator="kind")
]


class DedupConfig(Config):
    """The methods, in the order in which they are applied."""

    steps: tuple[DedupStep, ...] = (ExactConfig(), MinHashConfig())


DEDUP_PRESETS = {
    "default": DedupConfig(),
    "fineweb": DedupConfig(steps=(MinHashConfig(bands=14, rows=8, shingle_size=5),)),
}
"""`fineweb`: Penedo et al. 2024, arXiv 2406.17557, section 3.4 (there without the check of candidates)."""


def dedup_preset(name: str) -> DedupConfig:
    """The preset of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in DEDUP_PRESETS:
        known = ", ".join(DEDUP_PRESETS)
        raise ConfigError(
            f"deduplication preset {name!r} is unknown{suggest(name, DEDUP_PRESETS)}; use one of {known}"
        )
    return DEDUP_PRESETS[name]
