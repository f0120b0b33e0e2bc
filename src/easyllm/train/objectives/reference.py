"""Log-probabilities under the frozen reference model: computed in every step, or once before it.

A reference is the initial model of the run (with the adapter bypassed where only an adapter is
trained), or another model with the same tokenizer. Its log-probabilities do not change, so with
`reference: cached` they are computed once for all sequences of the run, stored in the run's folder
and read from there on resume: later epochs and evaluations need no second forward pass, and no
second model is in memory while weights are trained.
"""

import hashlib
import struct
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from easyllm.batches.packing import Batch, split_by_tokens
from easyllm.core.progress import track
from easyllm.examples.sample import AnySample
from easyllm.train.objectives.objective import Objective, ObjectiveConfig, Reference
from easyllm.train.objectives.sequence_logprobs import reference_logprobs


class ReferenceConfig(ObjectiveConfig):
    """Where reference log-probabilities come from."""

    reference: Literal["live", "cached"] = Field(
        default="live",
        description="`live` computes the reference log-probabilities of a batch in every step; "
        "`cached` computes those of all rows before the first step and stores them in the run's "
        "folder, which pays from the second epoch on, or where all weights are trained.",
    )
    reference_model: str | None = Field(
        default=None,
        description="Source of the reference model, which must have the tokenizer of `model`; "
        "null is the initial model of the run.",
    )


def use_reference(objective: Objective, config: ReferenceConfig) -> None:
    """Sets what the configuration says about the reference; called by constructors."""
    objective.reference_source = config.reference_model
    objective.caches_reference = config.reference == "cached"
    objective.needs_reference = not objective.caches_reference


def reference_sums(objective: Objective, batch: Batch) -> Tensor:
    """Returns Σ log π_ref of each sequence's labels, [S] fp32 or wider; 0 for padding."""
    cached = objective.cached_reference
    if cached is None:
        assert objective.reference is not None, "set by the run"
        return reference_logprobs(objective.reference, batch).sums
    values = [cached.get(digest, 0.0) for digest in _digests_of(batch)]
    return torch.tensor(values, device=batch.token_ids.device)


def sequence_digests(samples: Sequence[AnySample]) -> list[str]:
    """Returns a hash of the token ids and labels of each sequence of the samples."""
    return [_digest(part.token_ids, part.labels) for s in samples for part in s.parts]


def compute_reference(
    objective: Objective, reference: Reference, samples: Sequence[AnySample], micro_tokens: int
) -> dict[str, float]:
    """Returns the summed reference log-probability of each sequence of the samples, by its hash.

    The order and the batches depend on the samples alone, so the same data give the same bits.

    Args:
        objective: collates the samples.
        micro_tokens: maximum number of packed tokens per forward pass.
    """
    found: dict[str, float] = {}
    device = reference.model.device
    groups = split_by_tokens(samples, micro_tokens)
    for group in track(groups, "reference log-probabilities", total=len(groups), unit="batch"):
        batch = objective.collate(group).to(device)
        sums = reference_logprobs(reference, batch).sums.tolist()
        found.update(zip(sequence_digests(group), sums, strict=True))
    return found


def _digests_of(batch: Batch) -> Iterator[str]:
    ids, labels = batch.token_ids.tolist(), batch.labels.tolist()
    start = 0
    for length in batch.lengths:
        yield _digest(ids[start : start + length], labels[start : start + length])
        start += length


def _digest(token_ids: Sequence[int], labels: Sequence[int]) -> str:
    packed = struct.pack(f"<{2 * len(token_ids)}q", *token_ids, *labels)
    return hashlib.blake2b(packed, digest_size=16).hexdigest()


__all__ = [
    "ReferenceConfig",
    "compute_reference",
    "reference_sums",
    "sequence_digests",
    "use_reference",
]
