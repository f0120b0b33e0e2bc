"""Cost of a mixture of experts relative to a dense feed-forward of equal active size.

    python bench/moe.py [--tokens 512 2048] [--record]

Prints one JSON row. 8 experts, of which each token passes through 2 (each of width F, the dense one
2F), D 512, fp32, forward without gradient. The two are timed alternately, and the ratio is that of
the medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import machine
import torch

from easyllm.nn.config import GLUConfig, MoEConfig
from easyllm.nn.context import ForwardContext
from easyllm.nn.feed_forward import build_feed_forward

HIDDEN, EXPERTS, CHOSEN, WIDTH = 512, 8, 2, 1024
TURNS, WARMUP = 30, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    row = machine.row(
        "moe-forward",
        shape={"D": HIDDEN, "experts": EXPERTS, "chosen": CHOSEN, "expert_width": WIDTH},
        dtype="float32",
        results=[measure(tokens) for tokens in options.tokens],
    )
    machine.finish(row, "moe", record=options.record)


@torch.inference_mode()
def measure(tokens: int) -> dict[str, float]:
    """Returns milliseconds of both, and their ratio."""
    experts = MoEConfig(
        num_experts=EXPERTS,
        experts_per_token=CHOSEN,
        expert=GLUConfig(intermediate_size=WIDTH),
    )
    moe = build_feed_forward(experts, HIDDEN, 0)
    dense = build_feed_forward(GLUConfig(intermediate_size=CHOSEN * WIDTH), HIDDEN, 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in [*moe.parameters(), *dense.parameters()]:
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    context = ForwardContext.packed([tokens])
    times = in_turns(lambda: dense(x, context), lambda: moe(x, context))
    a, b = (1e3 * statistics.median(t) for t in times)
    flops = 3 * 2 * tokens * HIDDEN * CHOSEN * WIDTH
    return {
        "tokens": tokens,
        "dense_ms": round(a, 3),
        "moe_ms": round(b, 3),
        "ratio": round(b / a, 3),
        "dense_gflops": round(flops / a / 1e6, 1),
    }


def in_turns(*functions: Callable[[], object]) -> list[list[float]]:
    """Times the functions alternately, so that changes of the machine's speed affect all."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(WARMUP + TURNS):
        for mine, function in zip(times, functions, strict=True):
            start = time.perf_counter()
            function()
            if turn >= WARMUP:
                mine.append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
