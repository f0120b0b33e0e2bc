"""What quantization costs, measured on the saved files: size, perplexity, KL, agreement, speed."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from easyllm.adapters import merge
from easyllm.core.json_types import JsonObject
from easyllm.engine import LLM, SamplingParams
from easyllm.models import load_model, open_source
from easyllm.nn.decoder import Decoder
from easyllm.quant import KEPT
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.verify.export_gate import (
    BOUNDS,
    COMPUTED_IN_BF16,
    Gate,
    LogitsOf,
    Row,
    Variant,
    direct,
    run_gate,
    served,
)
from easyllm.verify.gate_text import GateText

READERS = {
    "gptq": "easyllm, gptqmodel, transformers (with optimum and gptqmodel), vLLM",
    "awq": "easyllm, AutoAWQ, transformers (with gptqmodel), vLLM",
    "compressed-tensors": "easyllm, transformers (with compressed-tensors), vLLM",
    "bitsandbytes": "easyllm, transformers (with bitsandbytes), vLLM",
    "gguf": "easyllm, llama.cpp and what is built on it",
}
SAVED, SERVED = "saved, reloaded", "served, against saved"
PAGE_TOKENS = 16
NEW_TOKENS = 48
"""Tokens decoded to measure speed, after half of them as a warm-up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What quantization costs, measured on the saved files.

    Attributes:
        path: the folder or file.
        bits_per_weight: bits of all weights divided by their number, scales counted.
        num_bytes: size of the weights' files.
        perplexity, original_perplexity: on the held-out text.
        gate: drift, KL and agreement with the original on it, of the saved files loaded again, of
            an engine that serves them, and of the base without an adapter or merged with it.
        tokens_per_s, original_tokens_per_s: decoding one sequence, here.
        seconds: what calibrating, quantizing and saving took.
        readers: the programs that are known to read the file.
        notes: what the user should know.
        complaint: why the gate failed, if the files were kept nevertheless.
    """

    path: Path
    bits_per_weight: float
    num_bytes: int
    perplexity: float
    original_perplexity: float
    gate: Gate
    tokens_per_s: float
    original_tokens_per_s: float
    seconds: float
    readers: str
    notes: tuple[str, ...]
    complaint: str | None = None

    @property
    def row(self) -> Row:
        """The comparison of the saved files with the original."""
        return next(row for row in self.gate.rows if row.name == SAVED)

    def as_dict(self) -> JsonObject:
        """Returns all figures as a dict."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {
            "path": str(self.path),
            "gate": self.gate.as_dict(),
            "kl_nats": self.row.kl_nats,
            "agreement": self.row.agreement,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True)
class Original:
    """The model before: its logits on the text, its speed, and comparisons of other forms with it.

    Attributes:
        text: the text.
        logits: [T, V] of each sequence.
        tokens_per_s: decoding one sequence.
        name: what it is called.
        rows: forms between it and the quantized files, such as an adapter's merged weights.
    """

    text: GateText
    logits: Sequence[Tensor]
    tokens_per_s: float
    name: str = "the original"
    rows: tuple[Row, ...] = ()


def measure_original(model: Decoder, tokenizer: Tokenizer, text: GateText) -> Original:
    """Measures the model before it is quantized; merges its adapter, if it has one."""
    logits = list(direct(model)(text.sequences))
    name, rows = "the original", tuple[Row, ...]()
    if model.is_adapted:
        name = "the attached adapter"
        reference = Variant(name=name, open=lambda: lambda _: logits)
        merged = Variant(
            name="merged in memory",
            open=lambda: direct(merge(model)),
            bound=BOUNDS[torch.float32],
        )
        rows = run_gate(reference, [merged], text).rows
    return Original(text, logits, _speed(model, tokenizer, text), name, rows)


def measure(
    target: Path,
    original: Original,
    tokenizer: Tokenizer,
    *,
    file_format: str,
    seconds: float,
    notes: Sequence[str],
) -> Price:
    """Loads the quantized files and measures them, as they run here."""
    again = load_quantized(target)
    text = original.text
    found = list(direct(again)(text.sequences))
    kept = Variant(name=SAVED, open=lambda: lambda _: found)
    rows = run_gate(
        Variant(name=original.name, open=lambda: lambda _: original.logits), [kept], text
    ).rows
    rows += run_gate(kept, [_served(again, tokenizer, text)], text).rows
    gate = Gate(text, original.name, (*original.rows, *rows))
    num_bytes = _size(target)
    return Price(
        path=target,
        bits_per_weight=8 * num_bytes / _count(again),
        num_bytes=num_bytes,
        perplexity=_perplexity(text, found),
        original_perplexity=_perplexity(text, original.logits),
        gate=gate,
        tokens_per_s=_speed(again, tokenizer, text),
        original_tokens_per_s=original.tokens_per_s,
        seconds=seconds,
        readers=READERS[file_format],
        notes=tuple(notes),
    )


def _served(model: Decoder, tokenizer: Tokenizer, text: GateText) -> Variant:
    """Returns the model as an engine serves it, to be compared with its own forward pass."""
    if model.config.num_labels is not None or model.config.has_prefix:
        return Variant(name=SERVED, open=lambda: "an engine does not serve such a model")
    pages = sum(-(-(len(ids) + 1) // PAGE_TOKENS) for ids in text.sequences)

    def open_engine() -> LogitsOf:
        llm = LLM(model=model, tokenizer=tokenizer, page_size=PAGE_TOKENS, num_pages=pages)
        return served(llm)

    return Variant(name=SERVED, open=open_engine, bound=COMPUTED_IN_BF16)


def load_quantized(target: Path) -> Decoder:
    """Loads quantized files in their packed form, everything else in fp32."""
    if target.suffix != ".gguf":
        return load_model(target, dtype="float32")
    kept = KEPT if open_source(target).keeps_blocks() else None
    return load_model(target, dtype="float32", quantize=kept)


def _speed(model: Decoder, tokenizer: Tokenizer, text: GateText) -> float:
    """Returns decoded tokens per second of one sequence.

    NaN for models that do not generate, and where other load hides the difference.
    """
    if model.config.num_labels is not None:
        return math.nan
    prompt = list(text.sequences[0][:16])
    most = min(NEW_TOKENS, model.config.max_seq_len - len(prompt) - 1)
    if most < 2:
        return math.nan
    llm = LLM(model=model, tokenizer=tokenizer, max_running=1, num_pages=16, prefix_caching=False)

    def decode(tokens: int) -> float:
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        begin = time.perf_counter()
        llm.generate([prompt], params)
        return time.perf_counter() - begin

    decode(most // 2 + 1)
    first, whole = min(decode(1), decode(1)), min(decode(most), decode(most))
    return (most - 1) / (whole - first) if whole > first else math.nan


def _perplexity(text: GateText, logits: Sequence[Tensor]) -> float:
    """Returns the perplexity of the sequences of a text, given their logits [T, V].

    NaN if no sequence has a second token.
    """
    total, count = 0.0, 0
    for ids, its in zip(text.sequences, logits, strict=True):
        if len(ids) < 2:
            continue
        targets = torch.tensor(ids[1:])
        total += float(torch.nn.functional.cross_entropy(its[:-1], targets, reduction="sum"))
        count += len(ids) - 1
    return math.exp(min(total / count, 700.0)) if count else math.nan


def _size(target: Path) -> int:
    files = [target] if target.is_file() else list(target.glob("*.safetensors"))
    return sum(path.stat().st_size for path in files)


def _count(model: Decoder) -> int:
    """Returns the number of weights."""
    packed = sum(math.prod(layer.storage.shape) for _, layer in model.weight_modules())
    inside = {id(layer.weight) for _, layer in model.weight_modules() if layer.weight is not None}
    return packed + sum(p.numel() for p in model.parameters() if id(p) not in inside)


def table(prices: Mapping[str, Price]) -> list[tuple[str, ...]]:
    """Returns the rows of a table that compares prices, the original first."""
    first = next(iter(prices.values()))
    rows: list[tuple[str, ...]] = [
        (
            *("original", "32.00", "", f"{first.original_perplexity:.3f}", "", ""),
            *(f"{first.original_tokens_per_s:.1f}", ""),
        )
    ]
    rows += [
        (
            name,
            f"{its.bits_per_weight:.2f}",
            f"{its.num_bytes / 1e6:.1f} MB",
            f"{its.perplexity:.3f}",
            f"{its.row.kl_nats:.4f}",
            f"{its.row.agreement:.1%}",
            f"{its.tokens_per_s:.1f}",
            f"{its.seconds:.0f} s",
        )
        for name, its in prices.items()
    ]
    return rows


COLUMNS = ("", "bits", "size", "perplexity", "KL", "top-1", "tokens/s", "time")

__all__ = ["COLUMNS", "Original", "Price", "load_quantized", "measure", "measure_original", "table"]
