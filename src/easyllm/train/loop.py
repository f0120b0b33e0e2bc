"""The training loop: it knows batches, an objective and an optimizer, and nothing of models or files.

loss of a step = Σ token losses of all its micro-batches / labelled tokens of all its micro-batches
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from easyllm.core.progress import Progress
from easyllm.data.loader import Loader
from easyllm.data.packing import Batch
from easyllm.nn.decoder import Decoder
from easyllm.train.config import TrainConfig
from easyllm.train.objectives import Objective
from easyllm.train.optim import MasterOptimizer
from easyllm.train.schedule import rate_factor
from easyllm.train.state import Totals


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimizer step did; the loss is the mean over the step's labelled tokens, in nats."""

    step: int
    loss_nats: float
    learning_rate: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    seconds: float
    metrics: dict[str, float]

    def figures(self) -> dict[str, float]:
        """As a line of `metrics.jsonl`."""
        return {
            "step": self.step,
            "train/loss_nats": self.loss_nats,
            "train/learning_rate": self.learning_rate,
            "train/grad_norm": self.grad_norm,
            "train/tokens": self.tokens,
            "train/trained_tokens": self.trained_tokens,
            "speed/tokens_per_s": self.tokens / self.seconds,
            **{f"train/{name}": value for name, value in self.metrics.items()},
        }


def run_steps(
    model: Decoder,
    objective: Objective,
    optimizer: MasterOptimizer,
    loader: Loader,
    config: TrainConfig,
    *,
    totals: Totals,
    total_steps: int,
    after_step: Callable[[StepReport], None],
) -> None:
    """Runs the steps that are left, calling `after_step` behind each."""
    model.train()
    with Progress("training", total=total_steps, unit="step") as progress:
        progress.skip(totals.step)
        while totals.step < total_steps:
            start = time.perf_counter()
            batches = loader.next_step()
            factor = rate_factor(config.schedule, totals.step, total_steps)
            loss, metrics = accumulate(model, objective, batches)
            norm = optimizer.step(factor, config.clip_norm)
            tokens = sum(batch.token_ids.numel() for batch in batches)
            trained = sum(batch.num_trained for batch in batches)
            totals.step += 1
            totals.tokens += tokens
            totals.trained_tokens += trained
            seconds = time.perf_counter() - start
            rate = config.optimizer.learning_rate * factor
            report = StepReport(totals.step, loss, rate, norm, tokens, trained, seconds, metrics)
            after_step(report)
            progress.advance(1, loss=loss, tokens=f"{tokens / seconds:.0f}/s")
    model.eval()


def accumulate(
    model: Decoder, objective: Objective, batches: Sequence[Batch]
) -> tuple[float, dict[str, float]]:
    """Adds the gradients of a step's micro-batches.

    Returns:
        The mean loss a labelled token, in nats (auxiliary terms apart), and the objective's figures, averaged by tokens.
    """
    num_tokens = max(1, sum(batch.num_trained for batch in batches))
    total, metrics = 0.0, dict[str, float]()
    for batch in batches:
        output = objective.loss(model, batch.to(model.device))
        whole = output.sum if output.auxiliary is None else output.sum + output.auxiliary
        (whole / num_tokens).backward()
        total += output.sum.item()
        for name, value in output.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + value * output.num_tokens / num_tokens
    return total / num_tokens, metrics


@torch.no_grad()
def mean_loss(model: Decoder, objective: Objective, batches: Iterable[Batch]) -> float:
    """Mean loss a labelled token over `batches`, in nats."""
    training = model.training
    model.eval()
    total, num_tokens = 0.0, 0
    for batch in batches:
        output = objective.loss(model, batch.to(model.device))
        total += output.sum.item()
        num_tokens += output.num_tokens
    model.train(training)
    return total / max(1, num_tokens)
