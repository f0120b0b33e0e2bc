"""Time of the backward pass relative to the forward pass, whose FLOPs it doubles; one JSON row.

python bench/backward.py [--tokens 512] [--record]
"""

import argparse
import statistics
import time

import machine
import torch

from easyllm.batches.packing import pack
from easyllm.examples.sample import Sample
from easyllm.models import load_model
from easyllm.plan.compute import training_flops
from easyllm.train.objectives import LanguageModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(2)
    model = load_model("smollm2", dtype="float32").requires_grad_(True).train()
    ids = tuple(torch.randint(100, 40000, (options.tokens + 1,)).tolist())
    batch = pack([Sample.from_mask(ids)])
    forward, backward = [], []
    for _ in range(options.repeats + 1):
        start = time.perf_counter()
        loss = LanguageModel().loss(model, batch).sum
        middle = time.perf_counter()
        loss.backward()
        forward.append(middle - start)
        backward.append(time.perf_counter() - middle)
        model.zero_grad()
    plan = training_flops(model.config, (options.tokens,))
    times = [statistics.median(x[1:]) for x in (forward, backward)]
    row = machine.row(
        "backward",
        shape={"model": "smollm2", "tokens": options.tokens},
        dtype="float32",
        forward_s=round(times[0], 3),
        backward_s=round(times[1], 3),
        time_ratio=round(times[1] / times[0], 2),
        flops_ratio_of_linears=plan.backward.linears / plan.forward.linears,
    )
    machine.finish(row, "backward", record=options.record)


if __name__ == "__main__":
    main()
