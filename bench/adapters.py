"""Decoding with eight LoRA adapters mixed in one batch and without any, alternating; one JSON row.

python bench/adapters.py [--model smollm2] [--rank 16] [--rounds 5] [--record]
"""

import argparse
import time

import machine
import torch
from paired import median_ratio

from easyllm.adapters import LoRAConfig
from easyllm.adapters.attach import place
from easyllm.engine import LLM, Request, SamplingParams

ADAPTERS, STREAMS, PROMPT, NEW = 8, 32, 128, 32
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    results = []
    for quantize in (None, "int4"):
        llm = LLM(
            options.model,
            quantize=quantize,
            prefix_caching=False,
            num_pages=600,
            deterministic=options.deterministic,
        )
        config = LoRAConfig(rank=options.rank, targets=TARGETS)
        for number in range(ADAPTERS):
            add_random(llm, config, f"adapter-{number}")
        names = [f"adapter-{i % ADAPTERS}" for i in range(STREAMS)]
        rates: dict[str, list[tuple[float, float]]] = {"without": [], "mixed": []}
        for _ in range(options.rounds + 1):  # the first round warms up
            rates["without"].append(rates_of(llm, [""] * STREAMS))
            rates["mixed"].append(rates_of(llm, names))
        for at, what in enumerate(("prefill", "decode", "whole")):
            pairs = zip(rates["without"][1:], rates["mixed"][1:], strict=True)
            ratios = [mixed[at] / without[at] for without, mixed in pairs]
            results.append(
                {
                    "weights": quantize or "float32",
                    "what": what,
                    "without_tokens_per_s": median(rates["without"], at),
                    "mixed_tokens_per_s": median(rates["mixed"], at),
                    "ratio": median_ratio(ratios),
                }
            )
    row = machine.row(
        "adapters",
        model=options.model,
        rank=options.rank,
        adapters=ADAPTERS,
        shape=[STREAMS, PROMPT, NEW],
        deterministic=options.deterministic,
        results=results,
    )
    machine.finish(row, "adapters", record=options.record)


def median(runs: list[tuple[float, ...]], at: int) -> float:
    """Returns the median rate, without the warm-up."""
    return round(sorted(run[at] for run in runs[1:])[(len(runs) - 1) // 2], 1)


@torch.no_grad()
def add_random(llm: LLM, config: LoRAConfig, name: str) -> None:
    """Attaches an adapter with small random matrices."""
    for _, adapter in place(llm.model, config, name=name).linears.values():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.01).requires_grad_(False)
    llm.model.eval()


def rates_of(llm: LLM, names: list[str]) -> tuple[float, float, float]:
    """Returns prompt, generated and whole (generated per second of all) tokens per second."""
    generator = torch.Generator().manual_seed(0)
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    for name in names:
        ids = torch.randint(1000, 40000, (PROMPT,), generator=generator).tolist()
        llm.engine.add(Request(prompt_ids=tuple(ids), params=params, adapter=name))
    start, seen, first = time.perf_counter(), set[int](), 0.0
    while llm.engine.busy:
        seen |= {event.request_id for event in llm.engine.step()}
        if not first and len(seen) == len(names):
            first = time.perf_counter() - start
    whole = time.perf_counter() - start
    count = len(names)
    return count * PROMPT / first, count * (NEW - 1) / (whole - first), count * NEW / whole


if __name__ == "__main__":
    main()
