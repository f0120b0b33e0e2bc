"""Streaming generation with attention sinks (StreamingLLM): losses, as one JSON row and a plot.

    python bench/streaming.py [--tokens 20000] [--window 512] [--sampled 500] [--record]

SmolLM2 reads WikiText-2's validation text in the engine with chunked prefill, through a KV cache of
`window` tokens: with 4 sinks (the first 4 tokens and the last 508), and without. At sampled
positions, the last 512 tokens are also recomputed by the plain model, which is the alternative
without streaming. Losses are in nats per token; differences are paired, with their standard error.
"""

import argparse
import math
import statistics
import time

import machine
import plot
import torch

from easyllm.engine import LLM, Request, SamplingParams
from easyllm.models import ContextConfig, load_model, load_tokenizer
from easyllm.nn.context import ForwardContext

FIGURE = machine.HERE.parent / "docs" / "figures" / "streaming.svg"
TEXT = machine.SHARED / "data" / "wikitext2_valid.txt"
BIN = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=20000)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--sampled", type=int, default=500)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    ids = load_tokenizer("smollm2").encode(TEXT.read_text(encoding="utf-8"))[: options.tokens]
    losses, seconds = {}, {}
    for name, sinks in ((f"{options.sinks} sinks", options.sinks), ("no sinks", 0)):
        start = time.perf_counter()
        losses[name] = streamed(ids, window=options.window - sinks, sinks=sinks)
        seconds[name] = round(time.perf_counter() - start, 1)
    first = 2 * options.window  # the cache has been full for a while from there on
    places = [first + i * (len(ids) - first - 1) // options.sampled for i in range(options.sampled)]
    start = time.perf_counter()
    afresh = recomputed(ids, places, options.window)
    seconds["afresh, sampled"] = round(time.perf_counter() - start, 1)
    results = {}
    for name, values in losses.items():
        gaps = [values[place] - loss for place, loss in zip(places, afresh, strict=True)]
        following = values[first:]
        results[name] = {
            "loss_nats": round(statistics.fmean(following), 4),
            "perplexity": round(math.exp(statistics.fmean(following)), 2),
            "minus_afresh_nats": round(statistics.fmean(gaps), 4),
            "standard_error": round(statistics.stdev(gaps) / math.sqrt(len(gaps)), 4),
        }
    names = list(results)
    ratio = results[names[1]]["perplexity"] / results[names[0]]["perplexity"]
    lines = {name: bins(values) for name, values in losses.items()}
    plot.write_lines(
        FIGURE,
        f"SmolLM2 on WikiText-2 through a cache of {options.window} tokens",
        lines,
        x_title="token",
        y_title=f"loss, nats per token (means of {BIN})",
    )
    row = machine.row(
        "streaming",
        shape={"tokens": len(ids), "window": options.window, "sampled": len(places)},
        results=results,
        afresh_loss_nats=round(statistics.fmean(afresh), 4),
        perplexity_ratio_without_sinks=round(ratio, 2),
        lines={name: [round(y, 2) for _, y in line] for name, line in lines.items()},
        seconds=seconds,
    )
    machine.finish(row, "streaming", record=options.record)


def streamed(ids: list[int], *, window: int, sinks: int) -> list[float]:
    """Returns the loss of each token after the first, stored at the preceding position."""
    context = ContextConfig(method="streaming", window=window, sinks=sinks)
    llm = LLM("smollm2", context=context, num_pages=96, max_step_tokens=512, max_running=1)
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    found: list[float] = []
    for event in llm.engine.run([Request(prompt_ids=tuple(ids), params=params)]):
        if event.prompt_logprobs is not None:
            found = [-each.raw for each in event.prompt_logprobs]
    return found


@torch.inference_mode()
def recomputed(ids: list[int], places: list[int], window: int) -> list[float]:
    """Returns the loss of the token after each place, from the last `window` tokens only."""
    model = load_model("smollm2", dtype="float32")
    losses = []
    for place in places:
        seen = torch.tensor(ids[place + 1 - window : place + 1])
        hidden = model(seen, ForwardContext.packed([window]))[-1:]
        losses.append(-float(model.head(hidden)[0].log_softmax(-1)[ids[place + 1]]))
    return losses


def bins(values: list[float]) -> list[tuple[float, float]]:
    """Returns the means of every `BIN` values, at the centres of their ranges."""
    groups = [values[i : i + BIN] for i in range(0, len(values), BIN)]
    return [(BIN * (i + 0.5), statistics.fmean(group)) for i, group in enumerate(groups)]


if __name__ == "__main__":
    main()
