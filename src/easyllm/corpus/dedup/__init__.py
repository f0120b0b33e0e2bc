"""Deduplication: exact and near-duplicate (MinHash) documents, repeated paragraphs and substrings.

Every method has two phases, so that splits can be processed in parallel by several processes or
machines:

1. Per split, without side effects: texts are mapped to small arrays of 64-bit hashes (`exact_keys`,
   `signatures`, `paragraph_keys`, `word_hashes`).
2. In the driver, over the arrays of all splits in order: find what repeats something earlier
   (`exact_duplicates`, `near_duplicates`, `repeated`, `repeated_words`).

Documents are ordered by split, so the result does not depend on the scheduling of workers.
`deduplicate.deduplicate` runs both phases in one process. This module exports only the
configuration, which does not need numpy.
"""

from easyllm.corpus.dedup.config import (
    DEDUP_PRESETS,
    DedupConfig,
    DedupPresetName,
    DedupStep,
    ExactConfig,
    MinHashConfig,
    ParagraphConfig,
    SubstringConfig,
    collision_probability,
    dedup_preset,
)

__all__ = [
    "DEDUP_PRESETS",
    "DedupConfig",
    "DedupPresetName",
    "DedupStep",
    "ExactConfig",
    "MinHashConfig",
    "ParagraphConfig",
    "SubstringConfig",
    "collision_probability",
    "dedup_preset",
]
