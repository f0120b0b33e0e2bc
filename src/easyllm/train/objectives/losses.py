"""The loss of a batch, its mean over batches, and bits per byte.

    mean loss     = Σ losses / Σ terms             nats per token (or per pair, per text)
    bits per byte = Σ losses / ln 2 / bytes        comparable between tokenizers

Means are over all terms of all batches. A mean of the batches' means would weight tokens unequally.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from easyllm.batches.packing import Batch
from easyllm.nn.decoder import Decoder
from easyllm.train.evaluating import evaluating


@dataclass(frozen=True, slots=True)
class LossOutput:
    """The summed loss in nats (differentiable), the number of terms, and metrics to log.

    The loop divides by the number of terms in the step (all micro-batches, all ranks), never by a
    micro-batch's own number: a mean of means would weight tokens unequally.

    Attributes:
        sum: scalar, summed over tokens (or over sequences or pairs, depending on the objective).
        num_tokens: number of terms in the sum, equal to `Objective.num_terms` of the batch.
        auxiliary: scalar of further terms to minimise, on the scale of `sum`, reported separately.
        metrics: means over the batch's terms, by name.
        counts: the number of values in a mean of `metrics`, for those that are not over all terms.
    """

    sum: Tensor
    num_tokens: int
    auxiliary: Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


class MeanLoss:
    """Sums of losses and metrics, and their means over terms.

    Args:
        num_terms: the number of terms of all batches, where it is known in advance (in a training
            step, whose gradients are divided by it); None counts the terms of the added batches.

    Attributes:
        sum: the summed loss, in nats.
        num_terms: the number of terms.
    """

    def __init__(self, num_terms: int | None = None) -> None:
        self.sum, self.num_terms = 0.0, num_terms or 0
        self._is_known = num_terms is not None
        self._metrics: dict[str, float] = {}
        self._partial: dict[str, tuple[float, int]] = {}  # sums and counts of other means

    def add(self, output: LossOutput) -> None:
        """Adds the loss and the metrics of a batch."""
        self.sum += output.sum.item()
        if not self._is_known:
            self.num_terms += output.num_tokens
        for name, value in output.metrics.items():
            if name in output.counts:
                total, count = self._partial.get(name, (0.0, 0))
                more = output.counts[name]
                self._partial[name] = (total + value * more, count + more)
                continue
            share = value * output.num_tokens
            if self._is_known:
                share /= self.num_terms
            self._metrics[name] = self._metrics.get(name, 0.0) + share

    def add_all(self, others: Iterable["MeanLoss"]) -> None:
        """Adds the sums of other ranks, whose means are over the same number of terms."""
        for other in others:
            self.sum += other.sum
            for name, share in other._metrics.items():
                self._metrics[name] = self._metrics.get(name, 0.0) + share
            for name, (more, number) in other._partial.items():
                total, count = self._partial.get(name, (0.0, 0))
                self._partial[name] = (total + more, count + number)

    @property
    def nats(self) -> float:
        """The mean loss per term, in nats; 0 without terms."""
        return self.sum / max(1, self.num_terms)

    @property
    def metrics(self) -> dict[str, float]:
        """Means of the objective's metrics, by name."""
        divisor = 1 if self._is_known else max(1, self.num_terms)
        means = {name: value / divisor for name, value in self._metrics.items()}
        partial = {name: total / max(1, n) for name, (total, n) in self._partial.items()}
        return means | partial


@torch.no_grad()
def evaluate_loss(
    model: Decoder, batches: Iterable[Batch], loss: Callable[[Decoder, Batch], LossOutput]
) -> MeanLoss:
    """Returns the losses of a model in evaluation mode over batches, which are read once.

    Args:
        model: the model; its training mode is restored.
        batches: the batches, on any device.
        loss: returns the summed loss of a batch on the model's device.
    """
    mean = MeanLoss()
    with evaluating(model):
        for batch in batches:
            mean.add(loss(model, batch.to(model.device)))
    return mean


def bits_per_byte(loss_nats: float, num_bytes: int) -> float:
    """Returns a summed loss in bits per byte of text.

    Args:
        loss_nats: the summed loss, in nats.
        num_bytes: number of UTF-8 bytes that the loss is over, at least 1.
    """
    return loss_nats / math.log(2) / num_bytes
