"""Evaluation of a model during its training."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context manager in which a model is in evaluation mode; its mode is restored on exit."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
