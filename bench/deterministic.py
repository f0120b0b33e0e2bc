"""Cost of deterministic mode: engine rates with and without it, alternating; one JSON row.

python bench/deterministic.py [--model smollm2] [--rounds 3] [--record]
"""

import argparse
import statistics

import machine

from easyllm.engine import LLM
from easyllm.engine.rates import Shape, measure_rates

SHAPES = (Shape(sequences=1, prompt=128, new=32), Shape(sequences=16, prompt=128, new=16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    plain = LLM(options.model, prefix_caching=False, num_pages=400)
    exact = LLM(options.model, prefix_caching=False, num_pages=400, deterministic=True)
    found: dict[str, list[list[float]]] = {"off": [], "on": []}
    for _ in range(options.rounds):
        for name, llm in (("off", plain), ("on", exact)):
            rates, _ = measure_rates(llm, SHAPES, repeats=1)
            found[name].append(
                [x for r in rates for x in (r.prefill_tokens_per_s, r.decode_tokens_per_s)]
            )
    medians = {
        name: [statistics.median(x) for x in zip(*runs, strict=True)]
        for name, runs in found.items()
    }
    results = []
    for i, shape in enumerate(SHAPES):
        for j, what in enumerate(("prefill", "decode")):
            off, on = (medians[name][2 * i + j] for name in ("off", "on"))
            results.append(
                {
                    "sequences": shape.sequences,
                    "what": what,
                    "off_tokens_per_s": round(off, 1),
                    "on_tokens_per_s": round(on, 1),
                    "cost": round(off / on, 2),
                }
            )
    row = machine.row("deterministic", model=options.model, dtype="float32", results=results)
    machine.finish(row, "deterministic", record=options.record)


if __name__ == "__main__":
    main()
