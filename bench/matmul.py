"""The three GEMMs of linear layers in bf16, ours and PyTorch's alternately, as one JSON row.

    python bench/matmul.py [--model smollm2] [--rows 2048] [--record]

Forward, gradient of the input and gradient of the weights, for the linears of a layer (fused where
they share an input, as in the model) and for the head (768 rows), in GFLOP/s: medians, with
operands that are not in the caches. A square GEMM in between shows the machine's current speed.
`relation` is PyTorch's time over ours for a complete layer and the head.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import machine
import torch
from torch import Tensor

from easyllm.models import open_source
from easyllm.ops import matmul as products

COPIES = 8  # of each operand, used cyclically
HEAD_ROWS = 768
TOGETHER = (
    ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"),
    ("mixer.o_proj",),
    ("feed_forward.gate_proj", "feed_forward.up_proj"),
    ("feed_forward.down_proj",),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=24)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    row = machine.row("products", model=options.model, rows=options.rows)
    counts = shapes(options.model)
    square = [torch.randn(2048, 1536).bfloat16(), torch.randn(1536, 1536).bfloat16()]
    squares, totals = [], {"ours": 0.0, "pytorch": 0.0}
    row["gflops"] = {}
    for (outputs, inputs), count in counts.items():
        is_head = count == 0
        rows = HEAD_ROWS if is_head else options.rows
        flops = 2 * rows * sum(outputs) * inputs
        times: dict[tuple[str, str], list[float]] = {}
        copies = 1 if is_head else COPIES
        sets = [operands(rows, outputs, inputs) for _ in range(copies)]
        for turn in range(options.repeats // (4 if is_head else 1)):
            squares.append(2 * 2048 * 1536**2 / seconds(lambda: square[0] @ square[1].T) / 1e9)
            for kind, call in calls(*sets[turn % copies]).items():
                for who in totals:
                    times.setdefault((kind, who), []).append(seconds(served(who, call)))
        for (kind, who), measured in times.items():
            median = statistics.median(measured)
            totals[who] += median * (count or options.rows / HEAD_ROWS)
            name = f"{' + '.join(map(str, outputs))} x {inputs}"
            row["gflops"].setdefault(name, {}).setdefault(kind, {})[who] = round(
                flops / median / 1e9
            )
    row["square_gflops"] = [round(x) for x in statistics.quantiles(squares, n=4)]
    row["relation"] = round(totals["pytorch"] / totals["ours"], 2)
    machine.finish(row, "products", record=options.record)


def shapes(model: str) -> dict[tuple[tuple[int, ...], int], int]:
    """Returns (outputs of the linears sharing an input, inputs) with counts per model.

    The head comes last, with a count of 0.
    """
    decoder = open_source(model).model(torch.float32, torch.device("cpu"))
    counts: dict[tuple[tuple[int, ...], int], int] = {}
    for layer in decoder.layers:
        for names in TOGETHER:
            weights = [layer.get_submodule(name).weight for name in names]
            key = tuple(len(weight) for weight in weights), weights[0].shape[1]
            counts[key] = counts.get(key, 0) + 1
    counts[(decoder.config.vocab_size,), decoder.config.hidden_size] = 0
    return counts


def operands(
    rows: int, outputs: tuple[int, ...], inputs: int
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Returns x, the weights, and the gradients of the outputs."""
    return (
        torch.randn(rows, inputs).bfloat16(),
        [torch.randn(n, inputs).bfloat16() for n in outputs],
        [torch.randn(rows, n).bfloat16() for n in outputs],
    )


def calls(x: Tensor, weights: list[Tensor], grads: list[Tensor]) -> dict[str, Callable[[], object]]:
    """Returns the three GEMMs: forward, input gradient and weight gradient."""
    return {
        "forward": lambda: products.linears(x, weights, [None] * len(weights)),
        "of_input": lambda: products.sum_of_matmuls(grads, weights),
        "of_weight": lambda: products.products([grad.T for grad in grads], x),
    }


def served(who: str, call: Callable[[], object]) -> Callable[[], None]:
    """Returns the call with or without our kernel."""

    def inner() -> None:
        serves = products._kernels
        if who == "pytorch":
            products._kernels = lambda *_sizes: None
        try:
            call()
        finally:
            products._kernels = serves

    return inner


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
