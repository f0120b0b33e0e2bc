"""Decoding speed of the compiled step and of the decoder in PyTorch, as one JSON row.

    python bench/decode.py [--weights int4 int8 float32] [--rows 1 8 32] [--contexts 128 1024]
                           [--record]

SmolLM2, pages of 64 tokens. The two are timed alternately, one step each. Minimum and median times
are reported: on a shared machine, the minimum shows what the code can reach. `cpu_ms` is the CPU
time with a single thread doing all the work. `--llama PYTHON FILE.gguf` times llama.cpp in the same
session, before and after.
"""

import argparse
import json
import statistics
import subprocess
import time
from typing import Any

import machine
import torch

from easyllm.engine.compiled_step import CompiledStep
from easyllm.models import load_model
from easyllm.nn.context import ForwardContext
from easyllm.nn.decoder import Decoder
from easyllm.ops.attention_rule import AttentionRule
from easyllm.ops.paged_attention import Pages, new_pages, paged_attention, write_pages
from easyllm.quant import quantize_weights, schemes

PAGE_SIZE, TURNS, WARMUP = 64, 40, 4
PAGE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", nargs="+", default=["int4", "int8", "float32"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--pages", choices=PAGE_DTYPES, default="bfloat16")
    parser.add_argument("--llama", nargs=3, metavar=("PYTHON", "SCRIPT", "GGUF"))
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    peers = [llama(options.llama)] if options.llama else []
    results = []
    for weights in options.weights:
        model = load_model("smollm2", dtype="float32")
        if weights in schemes():
            quantize_weights(model, weights)
        for context in options.contexts:
            for rows in options.rows:
                bench = Step(model, rows, context, PAGE_DTYPES[options.pages])
                results.append(
                    {"weights": weights, "rows": rows, "context": context, **bench.figures()}
                )
    if options.llama:
        peers.append(llama(options.llama))
    row = machine.row("decode", pages=options.pages, results=results, llama_cpp=peers)
    machine.finish(row, "decode", record=options.record)


class Step:
    """A decoding step of `rows` sequences at one context length, compiled or by the decoder."""

    def __init__(self, model: Decoder, rows: int, context: int, dtype: torch.dtype) -> None:
        mixer = model.config.layers[0].mixer
        each = context // PAGE_SIZE + 2
        shape = (rows * each, mixer.num_kv_heads, PAGE_SIZE, mixer.head_dim)
        self.model, self.rows, self.context = model, rows, context
        self.keys, self.values = ([new_pages(shape, dtype) for _ in model.layers] for _ in range(2))
        for pages in (*self.keys, *self.values):
            assert isinstance(pages, torch.Tensor)
            pages.normal_()
        self.table = torch.randperm(rows * each).int().view(rows, each)
        self.step = CompiledStep(model, self.keys, self.values)
        self.ids = torch.randint(0, model.config.vocab_size, (rows,)).tolist()

    @torch.inference_mode()
    def figures(self) -> dict[str, Any]:
        """Returns milliseconds and tokens per second of both, and the ratio of minimum times."""
        steps, decoders = [], []
        for turn in range(TURNS + WARMUP):
            for run, times in ((self.compiled, steps), (self.decoder, decoders)):
                start = time.perf_counter()
                run()
                if turn >= WARMUP:
                    times.append(1e3 * (time.perf_counter() - start))
        return {
            "step_ms": [round(min(steps), 2), round(statistics.median(steps), 2)],
            "pytorch_ms": [round(min(decoders), 2), round(statistics.median(decoders), 2)],
            "step_tokens_per_s": round(1e3 * self.rows / min(steps), 1),
            "ratio_of_least": round(min(decoders) / min(steps), 2),
            "cpu_ms": round(self.processor_ms(), 2),
        }

    def processor_ms(self) -> float:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        times = []
        for _ in range(TURNS):
            start = time.thread_time()
            self.compiled()
            times.append(1e3 * (time.thread_time() - start))
        torch.set_num_threads(threads)
        return min(times)

    def compiled(self) -> None:
        lengths = [self.context + 1] * self.rows
        self.step.run(self.ids, [self.context] * self.rows, self.table, lengths)

    def decoder(self) -> None:
        ones = (1,) * self.rows
        offsets = [self.context] * self.rows
        context = ForwardContext.packed(ones, store=self, offsets=offsets)
        self.model.head(self.model(torch.tensor(self.ids), context))

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rule: AttentionRule,
        prefix_lengths: tuple[int, ...] | None = None,  # noqa: ARG002 - no prefix when decoding
    ) -> torch.Tensor:
        """Implements the KV store interface that the decoder's attention calls."""
        pages: list[Pages] = [self.keys[layer], self.values[layer]]
        page_ids = self.table[:, self.context // PAGE_SIZE].long()
        slots = torch.full_like(page_ids, self.context % PAGE_SIZE)
        for store, x in zip(pages, (k, v), strict=True):
            write_pages(store, x, page_ids, slots)
        ones, lengths = (1,) * self.rows, (self.context + 1,) * self.rows
        return paged_attention(q, *pages, self.table, ones, lengths, rule)

    def recur(self, layer: int, step: Any, *inputs: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("SmolLM2 has no linear attention")


def llama(command: list[str]) -> list[dict[str, Any]]:
    """Returns the rows printed by the peer's script."""
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


if __name__ == "__main__":
    main()
