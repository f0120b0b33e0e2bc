"""Distillation: a model learns the token distributions of a teacher, such as a mixture of experts.

    loss = (1 - w) · -log p(label)  +  w · T² · KL(p_teacher^{1/T} ‖ p^{1/T})    (per token)

(Hinton et al. 2015, arXiv 1503.02531, section 2; T² keeps the gradients of both terms in proportion
when T changes.)
"""

from typing import Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from easyllm.batches.packing import Batch
from easyllm.core.paths import PathText
from easyllm.nn.decoder import Decoder
from easyllm.ops.cross_entropy import IGNORE_INDEX, rows_of_chunk
from easyllm.train.data_config import CorpusDataConfig, DataConfig
from easyllm.train.objectives.language_model import (
    LanguageModel,
    LanguageModelConfig,
    token_states,
)
from easyllm.train.objectives.objective import LossOutput, register_objective
from easyllm.train.objectives.router import routing_of, with_router_losses


class DistillationConfig(LanguageModelConfig):
    """Next-token prediction with the distributions of a teacher (arXiv 1503.02531)."""

    kind: Literal["distillation"] = "distillation"  # type: ignore[assignment]
    teacher: PathText = Field(
        description="Source of the teacher, a model with the same vocabulary."
    )
    temperature: PositiveFloat = Field(
        default=1.0, description="T, by which the logits of both models are divided."
    )
    weight: float = Field(
        default=0.5, ge=0, le=1, description="w, the share of the teacher's term in the loss."
    )


class Distillation(LanguageModel):
    """(1 - w) · cross-entropy + w · T² · KL(teacher ‖ model), over labelled tokens."""

    config: DistillationConfig
    needs_reference = True

    def __init__(self, config: DistillationConfig) -> None:
        super().__init__(config)
        self.reference_source = config.teacher

    def loss(self, model: Decoder, batch: Batch) -> LossOutput:
        """Returns the loss summed over labelled tokens, with both terms as metrics."""
        reference = self.reference
        assert reference is not None, "the run sets it, because the objective needs it"
        config = model.config
        rows = (batch.labels != IGNORE_INDEX).nonzero().squeeze(1)
        routing = routing_of(model)
        states, labels = token_states(model, batch, routing)
        kept = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        hidden, labels = states.index_select(0, kept), labels[kept]
        teacher = reference.hidden(batch).index_select(0, rows)
        count = rows_of_chunk(
            vocab_size=config.vocab_size, itemsize=4, device_type=hidden.device.type
        )

        def terms(part: Tensor, target: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
            return self._terms(model.head(part), reference.head(target), known)

        plain = distilled = hidden.new_zeros((), dtype=torch.float32)
        for chunk in zip(*(x.split(count) for x in (hidden, teacher, labels)), strict=True):
            # logits are computed again in the backward pass, so that a chunk's are in memory alone
            ce, kl = checkpoint(terms, *chunk, use_reentrant=False)
            plain, distilled = plain + ce, distilled + kl
        weight, tokens = self.config.weight, len(rows)
        total = (1 - weight) * plain + weight * distilled
        metrics = {
            "cross_entropy_nats": float(plain.detach()) / max(1, tokens),
            "teacher_kl_nats": float(distilled.detach())
            / self.config.temperature**2
            / max(1, tokens),
        }
        return with_router_losses(LossOutput(total, tokens, metrics=metrics), routing)

    def _terms(self, logits: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the summed cross-entropy and T² · KL of some rows."""
        ce = F.cross_entropy(logits, labels, reduction="sum")
        t = self.config.temperature
        ours, theirs = (logits / t).log_softmax(-1), (teacher / t).log_softmax(-1)
        kl = F.kl_div(ours, theirs, reduction="sum", log_target=True)
        return ce, t * t * kl


register_objective(DistillationConfig, build=Distillation, data=(DataConfig, CorpusDataConfig))
