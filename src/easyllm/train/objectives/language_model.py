"""Next-token prediction: pretraining when every token is labelled, supervised fine-tuning when the answers are."""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from easyllm.data.packing import Batch
from easyllm.nn.decoder import Decoder
from easyllm.ops.cross_entropy import linear_cross_entropy


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Summed loss in nats with gradient, the tokens in the sum, and figures to log.

    The loop divides by the number of tokens of the whole step (all micro-batches, all ranks), never by a
    micro-batch's own: a mean of means weighs tokens unequally.
    """

    sum: Tensor
    num_tokens: int
    metrics: dict[str, float] = field(default_factory=dict)


class Objective(Protocol):
    """A loss over packed batches."""

    def loss(self, model: Decoder, batch: Batch) -> LossOutput: ...


class LanguageModel:
    """Σ -log p(label | tokens before it) over labelled tokens."""

    def loss(self, model: Decoder, batch: Batch) -> LossOutput:
        hidden = model(batch.token_ids, batch.context())
        out = linear_cross_entropy(hidden, model.head_weight, batch.labels)
        return LossOutput(out.sum, out.num_tokens)
