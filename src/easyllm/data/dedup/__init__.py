"""Duplicates: whole documents (exact, MinHash), repeated paragraphs, repeated substrings.

Every method has two phases, so that splits can be worked on by processes or machines of their own:

1. each split, pure: texts to small arrays of 64-bit hashes (`exact_keys`, `signatures`, `paragraph_keys`, `word_hashes`);
2. the driver, over the arrays of all splits in their order: what is a repetition of something earlier
   (`exact_duplicates`, `near_duplicates`, `repeated`, `repeated_words`).

The order of splits is the order of documents, so the outcome does not depend on which worker was first.
`deduplicate.deduplicate` walks both phases in one process. This module exports the configuration alone, which needs
no numpy.
"""

from easyllm.data.dedup.config import (
    DEDUP_PRESETS,
    DedupConfig,
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
    "DedupStep",
    "ExactConfig",
    "MinHashConfig",
    "ParagraphConfig",
    "SubstringConfig",
    "collision_probability",
    "dedup_preset",
]
