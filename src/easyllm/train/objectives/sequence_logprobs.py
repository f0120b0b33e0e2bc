"""Log-probabilities of the labelled tokens of packed sequences, summed by sequence."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from easyllm.batches.packing import Batch
from easyllm.batches.shared_prompts import ANSWERS, share_prompts, shares_prompts
from easyllm.nn.decoder import Decoder
from easyllm.ops.cross_entropy import IGNORE_INDEX
from easyllm.ops.packed_linear import dequantized_products
from easyllm.ops.token_logprobs import linear_logprobs
from easyllm.train.evaluating import evaluating
from easyllm.train.objectives.objective import Reference


@dataclass(frozen=True, slots=True)
class SequenceLogprobs:
    """Log-probabilities of S sequences.

    Attributes:
        sums: [S], Σ log p of a sequence's labels in nats, fp32 or wider, differentiable.
        counts: [S] int64, number of labelled tokens.
    """

    sums: Tensor
    counts: Tensor

    @property
    def means(self) -> Tensor:
        """Mean log-probability per labelled token, [S]; 0 without labels."""
        return self.sums / self.counts.clamp(min=1)


def sequence_logprobs(
    model: Decoder, batch: Batch, *, base_only: bool = False, routing: list[Any] | None = None
) -> SequenceLogprobs:
    """Returns the summed log-probability of each sequence's labels, with one forward pass.

    The logits of all rows never exist at once: see `ops.token_logprobs`.

    Args:
        model: a language model.
        batch: packed sequences; where its extras describe groups with a common prompt
            (`batches.shared_prompts`), the prompt is computed once.
        base_only: disable the model's adapter.
        routing: a list that collects the decisions of MoE routers.
    """
    labelled = (batch.labels != IGNORE_INDEX).nonzero().squeeze(1)
    picked = hidden_at(model, batch, labelled, base_only=base_only, routing=routing)
    inputs, weight = (picked, model.head_weight) if base_only else model.loss_factors(picked)
    logprobs = linear_logprobs(
        inputs, weight, batch.labels[labelled], softcap=model.config.logit_softcap
    )
    return by_sequence(batch, labelled, logprobs)


def hidden_at(
    model: Decoder,
    batch: Batch,
    tokens: Tensor,
    *,
    base_only: bool = False,
    routing: list[Any] | None = None,
) -> Tensor:
    """Returns the final hidden states of some tokens of a batch, with one forward pass.

    Args:
        batch: as in `sequence_logprobs`.
        tokens: [N] int64, numbers of tokens of the batch.
        base_only: disable the model's adapter.
        routing: a list that collects the decisions of MoE routers.

    Returns:
        [N, D].
    """
    if can_share(model, batch, base_only=base_only):
        token_ids, context, rows = share_prompts(batch, base_only=base_only)
        hidden: Tensor = model(token_ids, context)
        return hidden.index_select(0, rows[tokens])
    context = batch.context(mask=model.config, base_only=base_only, routing=routing)
    hidden = model(batch.token_ids, context)
    return hidden.index_select(0, tokens)


@torch.no_grad()
def reference_logprobs(reference: Reference, batch: Batch) -> SequenceLogprobs:
    """Returns the log-probabilities under the reference model, in evaluation mode."""
    with evaluating(reference.model), dequantized_products():
        return sequence_logprobs(reference.model, batch, base_only=reference.without_adapter)


def can_share(model: Decoder, batch: Batch, *, base_only: bool = False) -> bool:
    """Returns whether the prompts of the batch's groups can be computed once."""
    virtual = 0 if base_only else model.num_virtual_tokens
    return ANSWERS in batch.extras and shares_prompts(model.config, virtual)


def by_sequence(batch: Batch, tokens: Tensor, values: Tensor) -> SequenceLogprobs:
    """Sums values by sequence.

    Args:
        tokens: [N] int64, numbers of tokens of the batch.
        values: [N], a value of each of them.
    """
    lengths = torch.tensor(batch.lengths, device=tokens.device)
    owner = torch.arange(len(batch.lengths), device=tokens.device).repeat_interleave(lengths)
    owner = owner[tokens]
    sums = values.new_zeros(len(batch.lengths)).index_add(0, owner, values)
    return SequenceLogprobs(sums, torch.bincount(owner, minlength=len(batch.lengths)))


__all__ = [
    "SequenceLogprobs",
    "by_sequence",
    "can_share",
    "reference_logprobs",
    "sequence_logprobs",
]
