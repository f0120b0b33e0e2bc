"""Quantizing a model to files: calibration, quantization, saving, and what it costs.

What it costs is measured on the saved files, loaded again: size, and on held-out text perplexity,
KL divergence and the share of equal most likely tokens against the original.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from easyllm.core.atomic import check_output_free
from easyllm.core.device import parse_dtype
from easyllm.core.errors import ConfigError, suggest
from easyllm.core.json_types import JsonObject
from easyllm.core.manifest import MANIFEST_FILE, Manifest, hash_path
from easyllm.core.progress import Progress
from easyllm.models import load_model, locate, open_source, save_model
from easyllm.models.gguf_export import save_gguf
from easyllm.nn.decoder import Decoder
from easyllm.pipeline.calibration import Calibration, calibration
from easyllm.pipeline.quantize_options import QuantizeOptions
from easyllm.quant.calibrate import importance_matrix
from easyllm.quant.formats import UNIFORM
from easyllm.quant.gguf_blocks import TYPES
from easyllm.quant.layers import LayerQuantizer
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
    if options.is_gguf and options.type not in TYPES:
        raise ConfigError(
            f"GGUF type {options.type!r} is not known{suggest(str(options.type), TYPES)}; use "
            f"{', '.join(TYPES)}"
        )
    check_output_free(target)
    opened = open_source(source)
    opened.check_unquantized(options.file_format)
    tokenizer = opened.tokenizer()
    model = opened.model(torch.float32, torch.device("cpu"))
    work = _Work(source, target, options, model, tokenizer)
    text = gate_text(
        tokenizer,
        vocab_size=model.config.vocab_size,
        max_seq_len=model.config.max_seq_len,
        path=None if options.text is None else Path(options.text),
    )
    write = work.gguf if options.is_gguf else work.folder
    calibrated = work.calibration()
    expected = list(direct(model)(text.sequences))
    notes = write(calibrated)
    if opened.gguf is not None:
        notes.insert(0, f"{source} is a GGUF file, whose weights were dequantized")
    del model, work, write
    again = load_model(target, dtype="float32")
    found = list(direct(again)(text.sequences))
    row = run_gate(
        Variant(name="the original", open=lambda: lambda _: expected),
        [Variant(name="quantized", open=lambda: lambda _: found)],
        text,
    ).rows[0]
    num_bytes = _size(target)
    return Price(
        path=target,
        bits_per_weight=8 * num_bytes / _count(again),
        num_bytes=num_bytes,
        perplexity=_perplexity(text, found),
        original_perplexity=_perplexity(text, expected),
        row=row,
        readers=READERS[options.file_format],
        notes=tuple(notes),
    )


@dataclass(frozen=True, slots=True)
class _Work:
    """A model to quantize, and what to quantize it to.

    Raises:
        ConfigError: the format cannot hold a linear of the model.
    """

    source: str
    target: Path
    options: QuantizeOptions
    model: Decoder
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        if not self.options.is_gguf:
            self._quantizer().check(self.model)

    def calibration(self) -> Calibration | None:
        """Returns the calibration text; None if the method needs none."""
        options = self.options
        if options.is_gguf:
            needed = options.importance and options.type != "q8_0"  # 8 bits need no search
        else:
            needed = find_method(options.method).needs != "nothing"
        if not needed:
            return None
        return calibration(
            self.tokenizer,
            path=None if options.data is None else Path(options.data),
            count=options.samples,
            length=min(options.length, self.model.config.max_seq_len),
        )

    def gguf(self, calibrated: Calibration | None) -> list[str]:
        """Writes a GGUF file; returns what the user should know."""
        importance, kind = None, str(self.options.type)
        if calibrated is not None:
            with self._progress("calibrating") as progress:
                importance = importance_matrix(
                    self.model, calibrated.sequences, done=lambda _: progress.advance(1)
                )
        written = save_gguf(
            self.model, self.target, type=kind, tokenizer=self.tokenizer, importance=importance
        )
        if not written.fallbacks:
            return []
        kinds = sorted(set(written.fallbacks.values()))
        return [
            f"{len(written.fallbacks)} tensors, such as {next(iter(written.fallbacks))}, are "
            f"{' or '.join(kinds)}: their width or their part in the model does not suit {kind}"
        ]

    def folder(self, calibrated: Calibration | None) -> list[str]:
        """Quantizes the model and writes a folder; returns what the user should know."""
        sequences = () if calibrated is None else calibrated.sequences
        with self._progress("quantizing") as progress:
            report = self._quantizer().run(
                self.model, sequences, done=lambda _: progress.advance(1)
            )
        manifest = Manifest.create(
            "quantize",
            config=self._described(calibrated),
            inputs={"model": hash_path(locate(self.source))},
            results={"linears": [asdict(linear) for linear in report.linears]},
        )
        save_model(
            self.model.to(parse_dtype(self.options.dtype)),
            self.target,
            tokenizer=self.tokenizer,
            extra_files={MANIFEST_FILE: manifest.model_dump(mode="json")},
        )
        unreached = report.unreached
        if not unreached:
            return []
        return [
            f"{len(unreached)} linears, such as {unreached[0]}, were reached by no calibration "
            "token and rounded to nearest; use more calibration text"
        ]

    def _quantizer(self) -> LayerQuantizer:
        layout, spec = UNIFORM[self.options.file_format], self.options.spec
        settings = {"act_order": True} if self.options.act_order else {}
        return LayerQuantizer(
            method=find_method(self.options.method, **settings),
            spec_of=lambda _: spec,
            store=lambda _, weight: layout.storage(weight, torch.float32),
            unsupported_reason=layout.unsupported_reason,
        )

    def _progress(self, label: str) -> Progress:
        return Progress(label, total=self.model.config.num_layers, unit="layer")

    def _described(self, calibrated: Calibration | None) -> JsonObject:
        found: JsonObject | None = None
        if calibrated is not None:
            found = {
                "source": calibrated.source,
                "sequences": len(calibrated.sequences),
                "tokens": calibrated.num_tokens,
                "sha256": calibrated.sha256,
            }
        options = self.options.model_dump(mode="json") | {"format": self.options.file_format}
        return {"model": self.source, **options, "calibration": found}


def _perplexity(text: GateText, logits: Sequence[Tensor]) -> float:
    """Returns the perplexity of the sequences of a text, given their logits [T, V]."""
    total, count = 0.0, 0
    for ids, its in zip(text.sequences, logits, strict=True):
        if len(ids) < 2:
            continue
        targets = torch.tensor(ids[1:])
        total += float(torch.nn.functional.cross_entropy(its[:-1], targets, reduction="sum"))
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
