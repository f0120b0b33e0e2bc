"""Contrastive training of text embeddings: InfoNCE with in-batch and hard negatives.

    L = -Σ_i log  exp(q_i·p_i / τ) / Σ_c exp(q_i·p_c / τ)       q, p: pooled states of unit length

The candidates c of a query are all positives and hard negatives of the step, except other copies of
its own positive (van den Oord et al. 2018, arXiv 1807.03748, eq. 4; in-batch negatives: Karpukhin
et al. 2020, arXiv 2004.04906, section 3.2).

A step's candidates span its micro-batches. The vectors of a step with several are computed twice:
first without gradients, from which follows the gradient of the loss of each vector, then a
micro-batch at a time with gradients, to which these are applied (Gao et al. 2021, arXiv
2101.06983). The gradient is thus that of the whole step at once, whatever the micro-batches are.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor
from torch.nn import functional as F

from easyllm.batches.packing import Batch, split_by_tokens
from easyllm.core.errors import ConfigError
from easyllm.examples.prepare import PreparationStats
from easyllm.examples.sample import AnySample
from easyllm.examples.text_pairs import NEGATIVE, PAIR, POSITIVE, QUERY, ROLE, TEXT
from easyllm.examples.text_pairs import prepare_text_pairs as read_pairs
from easyllm.nn.decoder import Decoder
from easyllm.ops.pooling import pool_states
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.train.data_config import GeneratedConfig, RowsConfig, TextPairsConfig
from easyllm.train.evaluating import evaluating
from easyllm.train.objectives.objective import (
    LossOutput,
    Objective,
    ObjectiveConfig,
    RunSetup,
    register_objective,
)


class ContrastiveConfig(ObjectiveConfig):
    """Text embeddings: a query is nearer to its positive than to the other texts of the step."""

    kind: Literal["contrastive"] = "contrastive"
    temperature: PositiveFloat = Field(
        default=0.05, description="Temperature τ of the softmax over candidates (SimCSE: 0.05)."
    )
    pooling: Literal["mean", "last"] = Field(
        default="mean",
        description="Vector of a text: the mean of its hidden states, or that of the last token.",
    )


class Contrastive(Objective):
    """InfoNCE over the pairs of a step; see the module."""

    generates = False

    def __init__(self, config: ContrastiveConfig | None = None) -> None:
        self.config = config or ContrastiveConfig()
        self._step: dict[tuple[int, ...], tuple[Tensor, float, float]] = {}

    def start(self, setup: RunSetup) -> None:
        """Refuses dropout, whose noise would differ between the two passes of a step.

        Raises:
            ConfigError: the model or its adapter has dropout.
        """
        if setup.drops:
            raise ConfigError(
                "contrastive training computes the vectors of a step twice, which dropout would "
                "change; set dropout to 0"
            )

    def prepare(
        self, data: RowsConfig | GeneratedConfig, files: Sequence[Path], tokenizer: Tokenizer
    ) -> tuple[Sequence[AnySample], PreparationStats]:
        """Reads pairs of texts and tokenizes them; see `Objective.prepare`."""
        assert isinstance(data, TextPairsConfig), "checked by the configuration"
        return read_pairs(
            files,
            tokenizer,
            query_key=data.query_key,
            positive_key=data.positive_key,
            negatives_key=data.negatives_key,
            max_seq_len=data.max_seq_len,
        )

    def num_terms(self, batch: Batch) -> int:
        """Returns the number of queries."""
        return int((batch.extras[ROLE] == QUERY).sum())

    def begin_step(self, model: Decoder, batches: Sequence[Batch]) -> None:
        """Computes the gradient of each vector of a step with several micro-batches."""
        self._step = {}
        if len(batches) < 2:
            return
        with torch.no_grad():
            found = [self._vectors(model, batch.to(model.device)) for batch in batches]
        vectors = torch.cat(found).requires_grad_()
        extras = {n: torch.cat([b.extras[n] for b in batches]) for n in (ROLE, PAIR, TEXT)}
        with torch.enable_grad():
            losses, right = self._losses(vectors, extras)
            (gradient,) = torch.autograd.grad(losses.sum(), vectors)
        sizes, queries = [len(v) for v in found], [self.num_terms(b) for b in batches]
        for batch, part, loss, hits in zip(
            batches,
            gradient.split(sizes),
            losses.detach().split(queries),
            right.split(queries),
            strict=True,
        ):
            self._step[_key(batch)] = (part, float(loss.sum()), float(hits.float().sum()))

    def loss(self, model: Decoder, batch: Batch) -> LossOutput:
        """Returns the loss summed over queries, and how often the positive is the nearest."""
        vectors, count = self._vectors(model, batch), self.num_terms(batch)
        if not self._step:
            losses, right = self._losses(vectors, batch.extras)
            return LossOutput(
                losses.sum(), count, metrics={"accuracy": float(right.float().mean())}
            )
        gradient, value, hits = self._step[_key(batch)]
        applied = (vectors[: len(gradient)] * gradient).sum()
        total = applied - applied.detach() + value
        return LossOutput(total, count, metrics={"accuracy": hits / max(1, count)})

    @torch.no_grad()
    def evaluate_samples(
        self, model: Decoder, samples: Sequence[AnySample], micro_batch_tokens: int
    ) -> dict[str, float]:
        """Returns the loss over all held-out texts as candidates, and retrieval figures.

        Returns:
            `loss_nats`; `recall_at_1`, the share of queries whose positive is nearest; `mrr`, the
            mean reciprocal rank among all candidates.
        """
        batches = [self.collate(group) for group in split_by_tokens(samples, micro_batch_tokens)]
        with evaluating(model):
            vectors = torch.cat([self._vectors(model, b.to(model.device)) for b in batches])
        extras = {n: torch.cat([b.extras[n] for b in batches]) for n in (ROLE, PAIR, TEXT)}
        scores, own = self._scores(vectors, extras)
        losses = F.cross_entropy(scores, own, reduction="sum")
        above = (scores > scores.gather(1, own[:, None])).sum(1)
        return {
            "loss_nats": float(losses) / len(own),
            "recall_at_1": float((above == 0).float().mean()),
            "mrr": float((1 / (1 + above.double())).mean()),
        }

    def _vectors(self, model: Decoder, batch: Batch) -> Tensor:
        """Returns the unit vectors of all sequences, [S, D] fp32."""
        hidden = model(batch.token_ids, batch.context())
        return F.normalize(pool_states(hidden, batch.lengths, self.config.pooling), dim=-1)

    def _losses(self, vectors: Tensor, extras: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the loss of each query [Q], and whether its positive is the nearest [Q]."""
        scores, own = self._scores(vectors, extras)
        return F.cross_entropy(scores, own, reduction="none"), scores.argmax(1) == own

    def _scores(self, vectors: Tensor, extras: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns each query's scores of all candidates [Q, C], and the column of its own [Q].

        A further copy of a query's positive, or the query itself as a text, has the score -∞.
        """
        role, pair, text = (extras[n].to(vectors.device) for n in (ROLE, PAIR, TEXT))
        queries = (role == QUERY).nonzero().squeeze(1)
        candidates = ((role == POSITIVE) | (role == NEGATIVE)).nonzero().squeeze(1)
        is_own = (pair[queries][:, None] == pair[candidates]) & (role[candidates] == POSITIVE)
        own = is_own.int().argmax(1)
        positive = text[candidates][own]
        same = (text[candidates] == positive[:, None]) | (
            text[candidates] == text[queries][:, None]
        )
        scores = vectors[queries] @ vectors[candidates].T / self.config.temperature
        return scores.masked_fill(same & ~is_own, float("-inf")), own


def _key(batch: Batch) -> tuple[int, ...]:
    """Identifies a micro-batch by its rows, padding aside."""
    kept = batch.extras[ROLE] > 0
    return tuple(batch.extras[PAIR][kept].tolist())


register_objective(
    ContrastiveConfig, build=Contrastive, data=(TextPairsConfig,), generates=Contrastive.generates
)

__all__ = ["Contrastive", "ContrastiveConfig"]
