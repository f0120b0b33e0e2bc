"""What quantization costs in perplexity, with its spread over calibration sets; JSON rows.

    python bench/quantization.py MODEL [--name NAME] [--sets 3] [--samples 32] [--length 256]
                                 [--tokens 8192] [--only rtn gptq ...] [--record]
    python bench/quantization.py MODEL --languages [--record]

Each method quantizes the model at each number of bits with each of `--sets` disjoint calibration
sets; perplexity and the KL divergence from the original are measured on WikiText-2's validation
text and on Chinese text, with dequantized weights, so that only the weights' error counts. GGUF
types are measured with and without an importance matrix. `--languages` compares calibration on
English alone with English, Chinese and code together. Also in the rows: seconds and peak memory.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import machine
import torch
from machine import SHARED
from paired import peak_rss_mb
from torch import Tensor, nn

from easyllm.evaluate.perplexity import perplexity
from easyllm.models import load_model, load_tokenizer
from easyllm.models.full_weights import to_full_weights
from easyllm.nn.decoder import Decoder
from easyllm.nn.linear import Linear
from easyllm.pipeline.calibration import LANGUAGES, calibration
from easyllm.quant import quantize_weights
from easyllm.quant.calibrate import importance_matrix
from easyllm.quant.formats import UNIFORM
from easyllm.quant.gguf_blocks import TYPES, quantize_blocks
from easyllm.quant.gguf_weight import GGUFWeight
from easyllm.quant.layers import LayerQuantizer
from easyllm.quant.methods import find_method
from easyllm.quant.spec import QuantSpec

GROUP, CONTEXT = 64, 512
KL_TOKENS, KL_CONTEXT = 1024, 256
"""Tokens of each text whose distributions are compared, in windows of this length."""
TEXTS = {"english": "wikitext2_valid.txt", "chinese": "wmt22.generaltest2022.zh-en.src.zh"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--name", help="name of the model in the row")
    parser.add_argument("--sets", type=int, default=3)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--languages", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    results = bench.languages() if options.languages else bench.methods()
    row = machine.row(
        "quantization-languages" if options.languages else "quantization",
        model=options.name or options.model,
        group_size=GROUP,
        calibration=[options.sets, options.samples, options.length],
        text_tokens=options.tokens,
        original=bench.original,
        results=results,
        peak_rss_mb=peak_rss_mb(),
    )
    machine.finish(row, "quantization", record=options.record)


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.tokenizer = load_tokenizer(options.model)
        self.model = to_full_weights(load_model(options.model, dtype="float32"))
        self.texts = {name: self._text(file) for name, file in TEXTS.items()}
        ids = {n: self.tokenizer.encode(t)[:KL_TOKENS] for n, t in self.texts.items()}
        self.windows = {n: torch.tensor([each]).view(-1, KL_CONTEXT) for n, each in ids.items()}
        self.log_probs = {n: log_probs(self.model, each) for n, each in self.windows.items()}
        self.original = self.perplexities(self.model)
        print(json.dumps({"original": self.original}), flush=True)

    def _text(self, file: str) -> str:
        text = (SHARED / "data" / file).read_text(encoding="utf-8")
        ids = self.tokenizer.encode(text[: 12 * self.options.tokens])[: self.options.tokens]
        return self.tokenizer.decode(ids)

    def perplexities(self, model: Decoder) -> dict[str, float]:
        context = min(CONTEXT, model.config.max_seq_len)
        return {
            name: round(perplexity(model, self.tokenizer, [text], context=context).perplexity, 4)
            for name, text in self.texts.items()
        }

    def divergences(self, model: Decoder) -> dict[str, float]:
        """Returns the mean KL divergence from the original, in nats per token."""
        found = {}
        for name, expected in self.log_probs.items():
            got = log_probs(model, self.windows[name])
            kl = nn.functional.kl_div(got, expected, reduction="sum", log_target=True)
            found[f"{name}_kl"] = round(float(kl) / len(expected), 5)
        return found

    def sets(self, languages: Sequence[str] = LANGUAGES) -> list[list[Tensor]]:
        """Returns disjoint sets of calibration sequences."""
        count, length = self.options.samples, self.options.length
        length = min(length, self.model.config.max_seq_len)
        whole = calibration(
            self.tokenizer, count=count * self.options.sets, length=length, languages=languages
        )
        found = list(whole.sequences)
        # languages alternate, so that consecutive sequences have all of them
        return [found[i * count : (i + 1) * count] for i in range(self.options.sets)]

    def methods(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for bits in (3, 4):
            found |= self.measured(f"rtn {bits}", lambda b=bits: [uniform(self.copy(), "rtn", b)])
            for method in ("gptq", "awq"):
                found |= self.measured(
                    f"{method} {bits}",
                    lambda m=method, b=bits: (
                        uniform(self.copy(), m, b, each) for each in self.sets()
                    ),
                )
        for scheme in ("nf4", "fp4", "llm.int8"):
            found |= self.measured(scheme, lambda s=scheme: [quantize_weights(self.copy(), s)])
        for type in TYPES:
            if self.fits(type):
                found |= self.measured(type, lambda t=type: [blocks(self.copy(), t)])
                found |= self.measured(
                    f"{type} importance",
                    lambda t=type: (blocks(self.copy(), t, each) for each in self.sets()),
                )
        return found

    def languages(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, parts in {"English": ("English",), "all": LANGUAGES}.items():
            for method, bits in (("gptq", 3), ("gptq", 4), ("awq", 3)):
                found |= self.measured(
                    f"{method} {bits}, {name}",
                    lambda m=method, b=bits, p=parts: (
                        uniform(self.copy(), m, b, each) for each in self.sets(p)
                    ),
                )
        return found

    def fits(self, type: str) -> bool:
        linears = (m for m in self.model.layers.modules() if isinstance(m, Linear))
        return all(m.in_features % TYPES[type].block == 0 for m in linears)

    def copy(self) -> Decoder:
        return copy.deepcopy(self.model)

    def measured(self, name: str, make: Callable[[], Any]) -> dict[str, Any]:
        """Returns the mean and the spread of perplexities, and seconds for each model."""
        if self.options.only and name.split()[0] not in self.options.only:
            return {}
        runs, seconds, started = [], [], time.perf_counter()
        for model in make():
            seconds.append(time.perf_counter() - started)
            full = to_full_weights(model)
            runs.append(self.perplexities(full) | self.divergences(full))
            started = time.perf_counter()
        row: dict[str, Any] = {"runs": runs, "seconds": round(statistics.mean(seconds), 1)}
        for figure in runs[0]:
            values = [run[figure] for run in runs]
            row[figure] = round(statistics.mean(values), 5)
            if len(values) > 1:
                row[f"{figure}_spread"] = round(statistics.stdev(values), 5)
        print(json.dumps({name: row}), flush=True)
        return {name: row}


@torch.no_grad()
def log_probs(model: Decoder, ids: Tensor) -> Tensor:
    """Returns the log-probabilities of all tokens after each of `ids` ([rows, length]): [n, V]."""
    return torch.cat([model.logits(row).log_softmax(-1) for row in ids])


def uniform(model: Decoder, method: str, bits: int, sequences: Sequence[Tensor] = ()) -> Decoder:
    """Quantizes the linears to symmetric grids."""
    layout = UNIFORM["compressed-tensors"]
    spec = QuantSpec(bits=bits, group_size=GROUP)
    LayerQuantizer(
        method=find_method(method),
        spec_of=lambda _: spec,
        store=lambda _, weight: layout.storage(weight, torch.float32),
    ).run(model, sequences)
    return model


@torch.no_grad()
def blocks(model: Decoder, type: str, sequences: Sequence[Tensor] | None = None) -> Decoder:
    """Quantizes the linears inside the layers to blocks of a GGUF type."""
    importance = {} if sequences is None else importance_matrix(model, sequences)
    for name, layer in model.layers.named_modules(prefix="layers"):
        if isinstance(layer, Linear):
            weight = layer.weight.detach()
            raw = quantize_blocks(weight, TYPES[type], importance.get(name))
            shape = (weight.shape[0], weight.shape[1])
            layer.store(GGUFWeight(raw, type, shape, torch.float32))
    return model


if __name__ == "__main__":
    main()
