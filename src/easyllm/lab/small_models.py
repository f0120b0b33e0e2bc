"""Small models for labs: a decoder of a few layers, and a short training run on token sequences."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import stdev

import torch

from easyllm.adapters import AdapterSet
from easyllm.batches.loader import Loader
from easyllm.examples.sample import AnySample, Sample
from easyllm.models.families import family_of
from easyllm.models.scratch import build_scratch
from easyllm.nn.config import ModelConfig
from easyllm.nn.decoder import Decoder
from easyllm.train.loop import accumulate, apply_gradients
from easyllm.train.objectives import Objective
from easyllm.train.objectives.language_model import LanguageModel
from easyllm.train.optim import MasterOptimizer
from easyllm.train.optim_config import AdamWConfig
from easyllm.train.precision import PrecisionPolicy

MICRO_BATCH_TOKENS = 4096


def small_config(*, vocab_size: int = 64, layers: int = 2, width: int = 64) -> ModelConfig:
    """Returns a Llama with heads of 16 dims, MHA, tied embeddings and a context of 512 tokens."""
    return family_of("llama").read_config(
        {
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 16,
            "num_key_value_heads": width // 16,
            "head_dim": 16,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        }
    )


def new_model(config: ModelConfig, seed: int = 0) -> Decoder:
    """Returns a model with random weights, ready to train."""
    return build_scratch(config, seed=seed).requires_grad_(True).train()


def train_small(
    model: Decoder,
    samples: Sequence[AnySample],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float = 3e-3,
    warmup: int = 0,
    seed: int = 0,
    objective: Objective | None = None,
    adapters: AdapterSet | None = None,
    before_step: Callable[[int], None] | None = None,
    after_step: Callable[[int, float], object] | None = None,
) -> list[float]:
    """Trains a model with AdamW and returns the loss of each step, in nats per token.

    The step is that of `easyllm train`: the loss is a sum over all labelled tokens of the step,
    divided by their number, and gradients are clipped to a norm of 1.

    Args:
        model: trained in place.
        samples: token sequences with labels.
        steps, batch_size: optimizer steps, and samples in each.
        learning_rate: peak rate, constant after `warmup` steps.
        warmup: steps of a linear rise of the rate.
        seed: order of the samples.
        objective: the loss; next-token prediction by default.
        adapters: the attached adapter, which is trained instead of the model.
        before_step: called with the number of steps done, once the gradients are known.
        after_step: called with the number of steps done, and the loss.
    """
    loss_of = objective or LanguageModel()
    model.train()
    config = AdamWConfig(learning_rate=learning_rate, betas=(0.9, 0.95))
    if adapters is None:
        optimizer = MasterOptimizer(dict(model.named_parameters()), config)
    else:
        trained = adapters.trained_parameters(model)
        optimizer = MasterOptimizer(trained, config, rate_factors=adapters.rate_factors(model))
    loader = Loader(
        samples, batch_size=batch_size, micro_batch_tokens=MICRO_BATCH_TOKENS, seed=seed
    )
    precision, losses = PrecisionPolicy(), list[float]()
    for step in range(steps):
        loss, _ = accumulate(model, loss_of, loader.next_step(), precision, adapters)
        factor = min(1.0, (step + 1) / warmup) if warmup else 1.0
        known = None if before_step is None else partial(before_step, step)
        apply_gradients(optimizer, precision, factor, 1.0, loss, known)
        losses.append(loss)
        if after_step is not None:
            after_step(step + 1, loss)
    return losses


def token_chains(
    generator: torch.Generator,
    count: int,
    *,
    vocab_size: int = 32,
    choices: int = 2,
    length: int = 32,
) -> list[Sample]:
    """Returns texts of a random Markov chain, in which one of `choices` tokens follows each.

    The entropy is ln `choices` nats per token, which no model can get below.
    """
    after = torch.stack(
        [torch.randperm(vocab_size, generator=generator)[:choices] for _ in range(vocab_size)]
    ).tolist()
    firsts = torch.randint(vocab_size, (count,), generator=generator).tolist()
    turns = torch.randint(choices, (count, length - 1), generator=generator).tolist()
    found = []
    for first, choice in zip(firsts, turns, strict=True):
        ids = [first]
        for turn in choice:
            ids.append(after[ids[-1]][turn])
        found.append(Sample.from_mask(ids))
    return found


@torch.no_grad()
def mean_loss(model: Decoder, samples: Sequence[Sample]) -> float:
    """Returns the loss of a model on samples, in nats per labelled token."""
    model.eval()
    objective = LanguageModel()
    loader = Loader(samples, batch_size=len(samples), micro_batch_tokens=4096, seed=None)
    found = objective.evaluate(model, loader.next_step())
    model.train()
    return found["loss_nats"]


def smoothed(values: Sequence[float], *, span: int = 10) -> list[tuple[float, float]]:
    """Returns points (step, mean of the last `span` values), at most 200 of them."""
    every = max(1, len(values) // 200)
    return [
        (float(i + 1), sum(values[max(0, i + 1 - span) : i + 1]) / min(span, i + 1))
        for i in range(0, len(values), every)
    ]


def standard_error(values: Sequence[float]) -> float:
    """Returns the standard error of the mean of two or more values."""
    return stdev(values) / math.sqrt(len(values))


__all__ = [
    "mean_loss",
    "new_model",
    "small_config",
    "smoothed",
    "standard_error",
    "token_chains",
    "train_small",
]
