"""Measures prefill and decode throughput of the engine as a share of the machine's peak rates.

Prefill is compute-bound, so it is compared with the matmul rate (FLOP/s). Decoding is bound by
memory bandwidth: each step reads every weight once, and the keys and values of every sequence, so
it is compared with the memory read rate. With many sequences, a step reads the weights once for all
of them and becomes compute-bound again.
"""

import time
from dataclasses import asdict, dataclass

import torch

from easyllm.core.json_types import JsonObject
from easyllm.engine.llm import LLM
from easyllm.engine.memory_plan import tensor_bytes
from easyllm.engine.params import SamplingParams
from easyllm.engine.request import Request
from easyllm.plan.compute import decode_flops, forward_flops
from easyllm.plan.kv_cache import cache_size
from easyllm.plan.machine import matmul_rate, read_rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A workload of concurrent requests of equal size.

    Attributes:
        sequences: number of sequences.
        prompt: prompt tokens per sequence.
        new: tokens to generate per sequence.
    """

    sequences: int
    prompt: int
    new: int


SHAPES = (
    Shape(sequences=1, prompt=128, new=128),
    Shape(sequences=1, prompt=1024, new=32),
    Shape(sequences=8, prompt=128, new=64),
    Shape(sequences=32, prompt=128, new=32),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Throughput of one workload.

    Attributes:
        sequences, prompt, new: the workload (see `Shape`).
        prefill_tokens_per_s: prompt tokens per second, over all sequences.
        prefill_share: FLOP/s of prefill as a share of the machine's matmul rate.
        decode_tokens_per_s: generated tokens per second, over all sequences.
        read_share: bytes/s of weights and cache read by decoding, as a share of the machine's
            memory read rate.
        matmul_share: FLOP/s of decoding as a share of the machine's matmul rate.
        first_token_s: time from submission until every sequence has its first token.
    """

    sequences: int
    prompt: int
    new: int
    prefill_tokens_per_s: float
    prefill_share: float
    decode_tokens_per_s: float
    read_share: float
    matmul_share: float
    first_token_s: float

    def as_dict(self) -> JsonObject:
        """Returns the fields as a dict, floats rounded to four significant digits."""
        return {
            k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in asdict(self).items()
        }


def measure_rates(
    llm: LLM, shapes: tuple[Shape, ...] = SHAPES, *, repeats: int = 3
) -> tuple[list[Rates], dict[str, float]]:
    """Measures the throughput of each workload (the best of `repeats` runs).

    Workloads longer than the model's context are skipped.

    Returns:
        The rates of each workload, and the machine's `matmul_flops_per_s` and `read_bytes_per_s`.
    """
    device = llm.model.device
    dtype = llm.model.dtype
    machine = {
        "matmul_flops_per_s": matmul_rate(dtype, device),
        "read_bytes_per_s": read_rate(device),
    }
    # warm-up: builds everything that is built on first use
    _run(llm, Shape(sequences=1, prompt=8, new=4), seed=0)
    found = []
    for shape in shapes:
        if shape.prompt + shape.new <= llm.engine.max_seq_len:
            runs = [_run(llm, shape, seed=1 + i) for i in range(repeats)]
            first = min(run[0] for run in runs)
            rest = min(run[1] for run in runs)
            found.append(_rates(llm, shape, first, rest, machine))
    return found, machine


def _rates(llm: LLM, shape: Shape, first: float, rest: float, machine: dict[str, float]) -> Rates:
    config, count = llm.model.config, shape.sequences
    steps = shape.new - 1
    context = shape.prompt + shape.new // 2
    weights = tensor_bytes(llm.model.parameters()) + tensor_bytes(llm.model.buffers())
    cache = cache_size(
        config, context=context, sequences=count, itemsize=llm.engine.cache_itemsize
    ).total
    flops = forward_flops(config, [shape.prompt], head_rows=1).total * count
    return Rates(
        **asdict(shape),
        prefill_tokens_per_s=count * shape.prompt / first,
        prefill_share=flops / first / machine["matmul_flops_per_s"],
        decode_tokens_per_s=count * steps / rest,
        read_share=(weights + cache) * steps / rest / machine["read_bytes_per_s"],
        matmul_share=decode_flops(config, context).total
        * count
        * steps
        / rest
        / machine["matmul_flops_per_s"],
        first_token_s=first,
    )


def _run(llm: LLM, shape: Shape, *, seed: int) -> tuple[float, float]:
    """Returns the seconds until all sequences have a first token, and from there to the last."""
    generator = torch.Generator().manual_seed(seed)
    params = SamplingParams(temperature=0.0, max_tokens=shape.new, ignore_eos=True)
    vocab = llm.model.config.vocab_size
    for _ in range(shape.sequences):
        ids = torch.randint(vocab // 4, vocab, (shape.prompt,), generator=generator)
        llm.engine.add(Request(prompt_ids=tuple(ids.tolist()), params=params))
    start, seen, first = time.perf_counter(), set[int](), 0.0
    while llm.engine.busy:
        seen |= {event.request_id for event in llm.engine.step()}
        if not first and len(seen) == shape.sequences:
            first = time.perf_counter() - start
    return first, time.perf_counter() - start - first
