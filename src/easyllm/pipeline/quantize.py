"""Quantizing a model to files: calibration, quantization, saving, and what it costs.

What it costs is measured on the saved files, loaded again: size, and on held-out text perplexity,
KL divergence and the share of equal most likely tokens against the original.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from easyllm.core.atomic import check_output_free
from easyllm.core.device import parse_dtype
from easyllm.core.errors import ConfigError, suggest
from easyllm.core.json_types import JsonObject
from easyllm.core.manifest import MANIFEST_FILE, Manifest, hash_path
from easyllm.core.progress import Progress
from easyllm.models import load_model, load_tokenizer, locate, open_source, save_model
from easyllm.models.gguf_export import Exported, save_gguf
from easyllm.nn.decoder import Decoder
from easyllm.nn.linear import Linear
from easyllm.nn.moe import ROUTERS
from easyllm.pipeline.calibration import Calibration, calibration
from easyllm.pipeline.quantize_options import QuantizeOptions
from easyllm.quant.calibrate import importance_matrix
from easyllm.quant.formats import UNIFORM
from easyllm.quant.gguf_blocks import TYPES
from easyllm.quant.layers import LayerQuantizer, Report
from easyllm.quant.methods import find_method
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.verify.export_gate import Row, Variant, direct, run_gate
from easyllm.verify.gate_text import GateText, gate_text

READERS = {
    "gptq": "easyllm, gptqmodel, transformers (with optimum and gptqmodel), vLLM",
    "awq": "easyllm, AutoAWQ, transformers (with gptqmodel), vLLM",
    "compressed-tensors": "easyllm, transformers (with compressed-tensors), vLLM",
    "gguf": "easyllm, llama.cpp and what is built on it",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What quantization costs, measured on the saved files.

    Attributes:
        path: the folder or file.
        bits_per_weight: bits of all weights divided by their number, scales counted.
        num_bytes: size of the weights' files.
        perplexity, original_perplexity: on the held-out text.
        row: drift, KL and agreement with the original on it.
        readers: the programs that are known to read the file.
        notes: what the user should know.
    """

    path: Path
    bits_per_weight: float
    num_bytes: int
    perplexity: float
    original_perplexity: float
    row: Row
    readers: str
    notes: tuple[str, ...]

    def as_dict(self) -> JsonObject:
        """Returns all figures as a dict."""
        return asdict(self) | {
            "path": str(self.path),
            "row": self.row.as_dict(),
            "notes": list(self.notes),
        }


def quantize(source: str, target: Path, options: QuantizeOptions) -> Price:
    """Quantizes a model and writes it; `target` is written completely or not at all.

    Args:
        source: the model's source, in full precision, or a GGUF file, which is dequantized.
        target: the folder, or for GGUF the file.
        options: method, grid and format.

    Raises:
        ConfigError: the format cannot hold the method or the grid.
        CheckpointError: the source is quantized already.
        DataError: there is too little calibration text.
        OutputError: the target exists or cannot be written.
    """
    _check_type(options)
    check_output_free(target)
    opened = open_source(source)
    opened.check_unquantized(options.file_format)
    tokenizer = load_tokenizer(source)
    model = load_model(source, dtype="float32")
    _check_layout(model, options)
    text = gate_text(
        tokenizer,
        vocab_size=model.config.vocab_size,
        max_seq_len=model.config.max_seq_len,
        path=None if options.text is None else Path(options.text),
    )
    found = _calibration(model, tokenizer, options)
    original = _perplexity(model, text)
    expected = list(direct(model)(text.sequences))
    notes = list[str]()
    if opened.gguf is not None:
        notes.append(f"{source} is a GGUF file, whose weights were dequantized")
    if options.is_gguf:
        notes += _write_gguf(model, tokenizer, target, found, options)
    else:
        notes += _write_folder(source, model, tokenizer, target, found, options)
    del model
    again = load_model(target, dtype="float32")
    row = run_gate(
        Variant(name="the original", open=lambda: lambda _: expected),
        [Variant(name="quantized", open=lambda: direct(again))],
        text,
    ).rows[0]
    num_bytes = _size(target)
    return Price(
        path=target,
        bits_per_weight=8 * num_bytes / _count(again),
        num_bytes=num_bytes,
        perplexity=_perplexity(again, text),
        original_perplexity=original,
        row=row,
        readers=READERS[options.file_format],
        notes=tuple(notes),
    )


def _check_type(options: QuantizeOptions) -> None:
    if options.is_gguf and options.type not in TYPES:
        raise ConfigError(
            f"GGUF type {options.type!r} is not known{suggest(str(options.type), TYPES)}; use "
            f"{', '.join(TYPES)}"
        )


def _check_layout(model: Decoder, options: QuantizeOptions) -> None:
    """Checks that the format can hold every linear, before any work."""
    layout = UNIFORM.get(options.file_format)
    if layout is None:
        return
    for name, linear in _linears(model):
        reason = layout.unsupported_reason(options.spec, linear.out_features, linear.in_features)
        reason = reason or options.spec.unsupported_reason(linear.in_features)
        if reason is not None:
            raise ConfigError(
                f"{name} [{linear.out_features}, {linear.in_features}] cannot be written as "
                f"{options.file_format}: {reason}"
            )


def _linears(model: Decoder) -> Iterator[tuple[str, Linear]]:
    """Yields the linears of the layers, routers excluded."""
    for name, module in model.weight_modules():
        if name.startswith("layers.") and isinstance(module, Linear) and not name.endswith(ROUTERS):
            yield name, module


def _calibration(
    model: Decoder, tokenizer: Tokenizer, options: QuantizeOptions
) -> Calibration | None:
    """Returns the calibration text; None if the method needs none."""
    if options.is_gguf:
        needed = options.importance and options.type != "q8_0"  # 8 bits need no search
    else:
        needed = find_method(options.method).needs != "nothing"
    if not needed:
        return None
    return calibration(
        tokenizer,
        path=None if options.data is None else Path(options.data),
        count=options.samples,
        length=min(options.length, model.config.max_seq_len),
    )


def _write_gguf(
    model: Decoder,
    tokenizer: Tokenizer,
    target: Path,
    found: Calibration | None,
    options: QuantizeOptions,
) -> list[str]:
    importance = None
    if found is not None:
        with Progress("calibrating", total=model.config.num_layers, unit="layer") as progress:
            importance = importance_matrix(
                model, found.sequences, done=lambda _: progress.advance(1)
            )
    written: Exported = save_gguf(
        model, target, type=str(options.type), tokenizer=tokenizer, importance=importance
    )
    if not written.fallbacks:
        return []
    kinds = sorted(set(written.fallbacks.values()))
    first = next(iter(written.fallbacks))
    return [
        f"{len(written.fallbacks)} tensors, such as {first}, are {' or '.join(kinds)}: their width "
        f"or their part in the model does not suit {options.type}"
    ]


def _write_folder(
    source: str,
    model: Decoder,
    tokenizer: Tokenizer,
    target: Path,
    found: Calibration | None,
    options: QuantizeOptions,
) -> list[str]:
    layout = UNIFORM[options.file_format]
    settings = {"act_order": True} if options.act_order else {}
    quantizer = LayerQuantizer(
        method=find_method(options.method, **settings),
        spec_of=lambda _: options.spec,
        store=lambda _, weight: layout.storage(weight, torch.float32),
    )
    sequences = () if found is None else found.sequences
    with Progress("quantizing", total=model.config.num_layers, unit="layer") as progress:
        report = quantizer.run(model, sequences, done=lambda _: progress.advance(1))
    manifest = Manifest.create(
        "quantize",
        config=_described(source, found, options),
        inputs={"model": hash_path(locate(source))},
        results={"linears": [asdict(linear) for linear in report.linears]},
    )
    save_model(
        model.to(parse_dtype(options.dtype)),
        target,
        tokenizer=tokenizer,
        extra_files={MANIFEST_FILE: manifest.model_dump(mode="json")},
    )
    return _notes(report)


def _described(source: str, found: Calibration | None, options: QuantizeOptions) -> JsonObject:
    return {
        "model": source,
        **options.model_dump(mode="json"),
        "format": options.file_format,
        "calibration": None
        if found is None
        else {
            "source": found.source,
            "sequences": len(found.sequences),
            "tokens": found.num_tokens,
            "sha256": found.sha256,
        },
    }


def _notes(report: Report) -> list[str]:
    unreached = report.unreached
    if not unreached:
        return []
    return [
        f"{len(unreached)} linears, such as {unreached[0]}, were reached by no calibration token "
        "and rounded to nearest; use more calibration text"
    ]


def _perplexity(model: Decoder, text: GateText) -> float:
    """Returns the perplexity of the sequences of a text, without windows."""
    total, count = 0.0, 0
    for ids, logits in zip(text.sequences, direct(model)(text.sequences), strict=True):
        if len(ids) < 2:
            continue
        targets = torch.tensor(ids[1:])
        total += float(torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="sum"))
        count += len(ids) - 1
    return math.exp(total / max(count, 1))


def _size(target: Path) -> int:
    files = [target] if target.is_file() else list(target.glob("*.safetensors"))
    return sum(path.stat().st_size for path in files)


def _count(model: Decoder) -> int:
    """Returns the number of weights."""
    packed = sum(math.prod(layer.storage.shape) for _, layer in model.weight_modules())
    inside = {id(layer.weight) for _, layer in model.weight_modules() if layer.weight is not None}
    return packed + sum(p.numel() for p in model.parameters() if id(p) not in inside)


__all__ = ["Price", "QuantizeOptions", "quantize"]
