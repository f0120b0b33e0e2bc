"""What fits: the largest batch or context in a memory, and what a machine trains in an evening."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from easyllm.adapters.lora import LoRAConfig
from easyllm.core.json_types import JsonObject
from easyllm.nn.config import ModelConfig
from easyllm.plan.budget import optimum
from easyllm.plan.compute import USUAL_MFU, training_flops
from easyllm.plan.inference import estimate_inference
from easyllm.plan.linears import largest_rank
from easyllm.plan.memory import MemoryEstimate, estimate_training
from easyllm.plan.parameters import count_parameters

Method = Literal["full", "lora", "qlora"]
METHODS: tuple[Method, ...] = ("full", "lora", "qlora")
MAX_SEQUENCES = 2**16
CONTEXTS = (256, 512, 1024, 2048, 4096)
EVENING_BATCH = 16
"""Sequences per forward pass at most in the plan of an evening; more save no time on a CPU."""
TOKENS_PER_WEIGHT = 20
"""Tokens per parameter below which a fresh model is called under-trained (arXiv 2203.15556)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The largest batch and the largest context that fit into a memory, for one use of a model.

    Attributes:
        use: `serving`, or the training method.
        recompute: recomputed activations of the training; None for serving.
        sequences: sequences of `context` tokens that fit at once; 0 if not even one does.
        longest: longest single sequence that fits, up to the model's context; 0 if none does.
        context: tokens per sequence.
        needed: bytes that one sequence needs.
    """

    use: str
    recompute: str | None
    sequences: int
    longest: int
    context: int
    needed: int

    def as_dict(self) -> JsonObject:
        """Returns plain values for JSON."""
        return {name: getattr(self, name) for name in Fit.__dataclass_fields__}


def method_setup(config: ModelConfig, method: Method) -> JsonObject:
    """Returns the arguments of `estimate_training` that a method sets."""
    if method == "full":
        return {}
    lora = LoRAConfig(rank=min(LoRAConfig().rank, largest_rank(config)))
    return {"adapter": lora, "scheme": "nf4" if method == "qlora" else None}


def fits_into(
    config: ModelConfig,
    memory_bytes: int,
    *,
    context: int,
    itemsize: int = 2,
    scheme: str | None = None,
    cache_itemsize: float = 2,
    train: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Fit]:
    """Yields what fits into `memory_bytes` when serving, and with each way of training.

    Args:
        config: configuration of the model.
        memory_bytes: memory for everything that the model allocates.
        context: tokens per sequence.
        itemsize: bytes per element of unquantized weights, when serving.
        scheme: quantization format of the weights, when serving.
        cache_itemsize: bytes per element of the KV cache.
        train: whether to include training.
        dtype: dtype of the training's matrix products.
    """

    def served(tokens: int, sequences: int) -> int:
        return estimate_inference(
            config,
            context=tokens,
            sequences=sequences,
            itemsize=itemsize,
            scheme=scheme,
            cache_itemsize=cache_itemsize,
        ).total

    yield _fit(config, memory_bytes, context, "serving", None, served)
    for method in METHODS if train else ():
        setup = method_setup(config, method)
        for recompute in ("none", "full"):

            def trained(
                tokens: int,
                sequences: int,
                setup: JsonObject = setup,
                recompute: str = recompute,
            ) -> int:
                return _training(config, tokens, sequences, dtype, setup, recompute).total

            row = min(context, config.max_seq_len)
            yield _fit(config, memory_bytes, row, method, recompute, trained)


def _fit(
    config: ModelConfig,
    memory_bytes: int,
    context: int,
    use: str,
    recompute: str | None,
    size: Callable[[int, int], int],
) -> Fit:
    most = _largest(lambda n: size(context, n), memory_bytes, MAX_SEQUENCES)
    longest = _largest(lambda n: size(n, 1), memory_bytes, config.max_seq_len)
    return Fit(
        use=use,
        recompute=recompute,
        sequences=most,
        longest=longest,
        context=context,
        needed=size(context, 1),
    )


def _largest(size: Callable[[int], int], limit: int, bound: int) -> int:
    """Returns the largest n from 1 to `bound` with size(n) <= limit, or 0; size never decreases.

    n is doubled until it is too large, because large sizes take long to plan. Sizes are almost
    linear in n, so that interpolation then finds it in a few steps; every third step halves the
    interval.
    """
    low, high, least, most = 0, 1, 0, size(1)
    while most <= limit:
        if high == bound:
            return bound
        low, least, high = high, most, min(2 * high, bound)
        most = size(high)
    steps = 0
    while high - low > 1:
        steps += 1
        share = (limit - least) / (most - least) if steps % 3 else 0.5
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        found = size(middle)
        if found <= limit:
            low, least = middle, found
        else:
            high, most = middle, found
    return low


def _training(
    config: ModelConfig,
    tokens: int,
    sequences: int,
    dtype: torch.dtype,
    setup: JsonObject,
    recompute: str,
) -> MemoryEstimate:
    return estimate_training(
        config,
        micro_batch_tokens=tokens * sequences,
        row_tokens=tokens,
        dtype=dtype,
        recompute=recompute,  # type: ignore[arg-type]
        **setup,
    )


# ---- an evening


@dataclass(frozen=True, slots=True, kw_only=True)
class EveningRun:
    """A training that a machine finishes in a given time.

    Attributes:
        model: name of the model's size.
        method: how it is trained.
        context: tokens per sequence.
        batch: sequences per forward pass.
        tokens: tokens that fit into the time.
        memory_bytes: peak memory of the model and its training.
        parameters: parameters of the model.
        note: what the tokens amount to.
    """

    model: str
    method: str
    context: int
    batch: int
    tokens: int
    memory_bytes: int
    parameters: int
    note: str

    def as_dict(self) -> JsonObject:
        """Returns plain values for JSON."""
        return {name: getattr(self, name) for name in EveningRun.__dataclass_fields__}


def evening_runs(
    configs: Mapping[str, ModelConfig],
    *,
    seconds: float,
    flops_per_s: float,
    memory_bytes: int,
    context: int | None = None,
    dtype: torch.dtype = torch.float32,
    utilisation: float = USUAL_MFU,
) -> Iterator[EveningRun]:
    """Yields what this machine trains in `seconds`, for each model and method that fits.

    Args:
        configs: models by name.
        seconds: time for all steps.
        flops_per_s: matmul rate of the machine.
        memory_bytes: free memory.
        context: tokens per sequence; by default the longest of `CONTEXTS` that fits the model.
        dtype: dtype of the matrix products.
        utilisation: share of the rate that training reaches.
    """
    done = flops_per_s * utilisation * seconds
    for name, config in configs.items():
        rows = context or max(n for n in CONTEXTS if n <= max(config.max_seq_len, CONTEXTS[0]))
        rows = min(rows, config.max_seq_len)
        for method in METHODS:
            setup = method_setup(config, method)
            batch, memory = _largest_batch(config, rows, dtype, setup, memory_bytes)
            if memory is None:
                continue
            flops = training_flops(config, (rows,), adapter=setup.get("adapter"))
            tokens = int(done / flops.total * rows)
            count = count_parameters(config).total
            yield EveningRun(
                model=name,
                method=method,
                context=rows,
                batch=batch,
                tokens=tokens,
                memory_bytes=memory.total,
                parameters=count,
                note=_note(method, tokens, rows, count),
            )


def fresh_optimum(seconds: float, flops_per_s: float, utilisation: float = USUAL_MFU) -> JsonObject:
    """Returns the compute-optimal fresh model for a time on this machine."""
    return optimum(flops_per_s * utilisation * seconds).as_dict()


def _largest_batch(
    config: ModelConfig, rows: int, dtype: torch.dtype, setup: JsonObject, memory_bytes: int
) -> tuple[int, MemoryEstimate | None]:
    batch = EVENING_BATCH
    while batch:
        memory = _training(config, rows, batch, dtype, setup, "none")
        if memory.fits(memory_bytes):
            return batch, memory
        batch //= 2
    return 0, None


def _note(method: Method, tokens: int, rows: int, parameters: int) -> str:
    """Returns what the tokens amount to: full rows, or tokens per parameter."""
    text = f"{tokens // rows:,} sequences of {rows:,}"
    if method != "full":
        return text
    ratio = tokens / parameters
    verdict = "compute-optimal or more" if ratio >= TOKENS_PER_WEIGHT else "fine-tuning only"
    return f"{text}; {ratio:.2g} tokens per parameter ({verdict})"


__all__ = ["EveningRun", "Fit", "evening_runs", "fits_into", "fresh_optimum", "method_setup"]
