"""Configuration of deduplication: one class per method, distinguished by `kind`."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from easyllm.core.config import Config
from easyllm.core.errors import ConfigError, suggest


class ExactConfig(Config):
    """Exact deduplication: of documents with equal text, the first is kept."""

    kind: Literal["exact"] = "exact"
    normalize: bool = Field(
        True,
        description="Ignore case, the amount of white space and Unicode composition, but not "
        "punctuation (a+b is not a-b).",
    )


class ParagraphConfig(Config):
    """Paragraph deduplication: removes paragraphs that occurred before in any document.

    Source: CCNet, arXiv 1911.00359, section 3.1.
    """

    kind: Literal["paragraph"] = "paragraph"
    unit: Literal["paragraph", "line"] = Field(
        "paragraph",
        description="Unit that is compared: `paragraph` (separated by blank lines) or `line`.",
    )
    min_words: PositiveInt = Field(
        5, description='Paragraphs with fewer words (headings, "Yes.") are never removed.'
    )


class SubstringConfig(Config):
    """Exact-substring deduplication: removes runs of words that occurred before in any document.

    Source: Lee et al. 2021, arXiv 2107.06499.
    """

    kind: Literal["substring"] = "substring"
    min_words: Annotated[int, Field(ge=2)] = Field(
        50, description="Minimum length of a run; a Han character or kana counts as a word."
    )


class MinHashConfig(Config):
    """Near-duplicate removal (MinHash LSH): of documents with similar shingles, keeps the first.

    Candidate pairs share all `rows` minima of at least one of the `bands` (Broder 1997; Leskovec et
    al., Mining of Massive Datasets, section 3.4). Each candidate is verified with the exact Jaccard
    similarity, so the bands determine recall but never what is removed. 20 bands of 5 rows find
    99.96% of the pairs with similarity 0.8; FineWeb's 14 bands of 8 rows find 92%.

    One changed word changes `shingle_size` shingles: in 100 words, 2 changes lead to a Jaccard
    similarity of 0.81 with 5-word shingles and of 0.88 with 3-word shingles. With 3 (the default),
    every pair of longer texts at 0.8 in 5-word shingles is above 0.8 too; scattered changes that
    reduce it to 0.8 leave the similarity in 5-word shingles above 0.65.

    Only in large groups of similar pages that are not near-duplicates (the template of a shop) can
    a pair be missed because of `max_bucket`.
    """

    kind: Literal["minhash"] = "minhash"
    threshold: Annotated[float, Field(gt=0, le=1)] = Field(
        0.8, description="Minimum Jaccard similarity of a removed document with the kept one."
    )
    bands: PositiveInt = Field(20, description="Number of LSH bands.")
    rows: PositiveInt = Field(5, description="Number of MinHash values per band.")
    unit: Literal["word", "character"] = Field(
        "word",
        description="Unit of shingles: `word` (a Han character or kana counts as a word), or "
        "`character`: the letters and digits of the words.",
    )
    shingle_size: PositiveInt = Field(3, description="Units per shingle.")
    seed: NonNegativeInt = Field(1, description="Seed of the hash functions.")
    max_bucket: PositiveInt = Field(
        256,
        description="Maximum number of kept documents stored per LSH bucket; it bounds the work "
        "for large groups of similar pages that are not near-duplicates.",
    )

    @model_validator(mode="after")
    def _bands_reach_the_threshold(self) -> "MinHashConfig":
        found = collision_probability(self.threshold, self.bands, self.rows)
        if found < 0.5:
            raise ValueError(
                f"bands={self.bands} with rows={self.rows} find {found:.0%} of the pairs at "
                f"threshold={self.threshold}, expected at least half; set fewer rows or more bands"
            )
        return self


def collision_probability(similarity: float, bands: int, rows: int) -> float:
    """Returns the probability that a pair becomes a candidate: 1 - (1 - s^r)^b.

    Args:
        similarity: Jaccard similarity s of the pair.
        bands: number of bands b.
        rows: number of rows per band r.

    >>> [round(collision_probability(s, 20, 5), 4) for s in (0.5, 0.8)]
    [0.4701, 0.9996]
    """
    return float(1 - (1 - similarity**rows) ** bands)


DedupStep = Annotated[
    ExactConfig | ParagraphConfig | SubstringConfig | MinHashConfig, Field(discriminator="kind")
]


class DedupConfig(Config):
    """The deduplication steps, in the order in which they are applied."""

    steps: tuple[DedupStep, ...] = Field(
        (ExactConfig(), MinHashConfig()),
        description="Steps in the order in which they are applied.",
    )


DedupPresetName = Literal["default", "fineweb"]

DEDUP_PRESETS: dict[str, DedupConfig] = {
    "default": DedupConfig(),
    "fineweb": DedupConfig(steps=(MinHashConfig(bands=14, rows=8, shingle_size=5),)),
}
"""`fineweb`: Penedo et al. 2024, arXiv 2406.17557, section 3.4 (without verifying candidates)."""


def dedup_preset(name: str) -> DedupConfig:
    """Returns the deduplication preset with the given name.

    Raises:
        ConfigError: no preset has this name.
    """
    if name not in DEDUP_PRESETS:
        known = ", ".join(DEDUP_PRESETS)
        raise ConfigError(
            f"deduplication preset {name!r} is unknown{suggest(name, DEDUP_PRESETS)}; "
            f"use one of {known}"
        )
    return DEDUP_PRESETS[name]
