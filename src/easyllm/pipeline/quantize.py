"""Quantizing a model to files: calibration, quantization, saving, and what it costs."""

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from easyllm.adapters import check_mergeable
from easyllm.adapters.targets import name_matches
from easyllm.core.atomic import check_output_free, unfinished
from easyllm.core.device import parse_dtype
from easyllm.core.errors import ConfigError, suggest
from easyllm.core.json_types import JsonObject
from easyllm.core.manifest import MANIFEST_FILE, Manifest, hash_path, hash_value
from easyllm.core.progress import Progress
from easyllm.models import add_adapter, locate, open_source, save_model
from easyllm.models.full_weights import to_full_weights
from easyllm.models.gguf_export import gguf_types, save_gguf
from easyllm.models.hf_config import read_end_ids
from easyllm.models.load import OpenSource
from easyllm.nn.decoder import Decoder
from easyllm.pipeline.calibration import Calibration, calibration
from easyllm.pipeline.quantize_options import BITSANDBYTES, FULL, QuantizeOptions
from easyllm.pipeline.quantize_price import Price, measure, measure_original
from easyllm.quant import find_scheme, quantizable, quantize_weight
from easyllm.quant.calibrate import importance_matrix
from easyllm.quant.formats import UNIFORM
from easyllm.quant.gguf_blocks import TYPES
from easyllm.quant.layer_files import LayerFiles
from easyllm.quant.layers import LayerQuantizer
from easyllm.quant.methods import METHODS, find_method
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.verify.export_gate import GateError
from easyllm.verify.gate_text import gate_text

MAX_KL = 1.0
"""Largest mean KL divergence from the original in nats per token: more than rounding to 3 bits
costs a model, less than a broken file does."""


def quantize(
    source: str,
    target: Path,
    options: QuantizeOptions,
    *,
    adapter: Path | None = None,
    max_kl: float = MAX_KL,
    keep: bool = False,
) -> Price:
    """Quantizes a model and writes it; `target` is written completely or not at all.

    Args:
        source: the model's source, in full precision, or a GGUF file, which is dequantized.
        target: the folder, or for GGUF the file.
        options: method, grid and format.
        adapter: the folder of an adapter that is merged into the model first; the result is
            compared with the attached adapter.
        max_kl: largest mean KL divergence from the original in nats per token.
        keep: whether the result is kept even if it differs by more than that.

    Raises:
        GateError: the result differs by more than `max_kl`, a merged adapter or a served model by
            more than rounding, and `keep` is not set; nothing is written then.
        ConfigError: the format cannot hold the method or the grid, or the source is quantized
            already and `options.dequantize` is not set.
        DataError: there is too little calibration text.
        OutputError: the target exists or cannot be written.
    """
    types = gguf_types()
    if options.is_gguf:
        _check_types(options, types)
    check_output_free(target)
    opened = open_source(source)
    if opened.packed is not None and not options.dequantize:
        raise ConfigError(
            f"the weights of {opened.path} are already quantized as {opened.packed.name}; start "
            "from the original, or add --dequantize to round the dequantized weights again, which "
            "adds to their error"
        )
    tokenizer = opened.tokenizer()
    model = to_full_weights(opened.model(torch.float32, torch.device("cpu")))
    if adapter is not None:
        check_mergeable(add_adapter(model, adapter, base=source))
    work = _Work(source, target, options, model, tokenizer, adapter)
    text = gate_text(
        tokenizer,
        vocab_size=model.config.vocab_size,
        max_seq_len=model.config.max_seq_len,
        path=None if options.text is None else Path(options.text),
    )
    calibrated = work.calibration()
    original = measure_original(model, tokenizer, text)
    begin = time.perf_counter()
    with unfinished(target) as made:
        notes = [*_source_notes(opened), *work.write(calibrated, made)]
        seconds = time.perf_counter() - begin
        del model, work
        price = measure(
            made,
            original,
            tokenizer,
            file_format=options.file_format,
            seconds=seconds,
            notes=notes,
        )
        complaint = _complaint(price, max_kl)
        if complaint is not None and not keep:
            raise GateError(
                f"{complaint}; nothing was written to {str(target)!r}: use more bits or another "
                "method, allow it with --max-kl, or keep the result with --keep",
                price.gate,
            )
    return replace(price, path=target)


def _complaint(price: Price, max_kl: float) -> str | None:
    """Returns what is wrong with a result, as the first half of a sentence; None if nothing is."""
    if not price.gate.passed:
        return price.gate.complaint
    kl = price.row.kl_nats
    if kl <= max_kl:
        return None
    return (
        f"the quantized model differs from {price.gate.reference} by a KL divergence of "
        f"{kl:.2f} nats per token (allowed {max_kl:g})"
    )


def compare(
    source: str, options: Mapping[str, QuantizeOptions], *, adapter: Path | None = None
) -> dict[str, Price]:
    """Quantizes a model in several ways, each to temporary files, and returns what each costs.

    Args:
        source, adapter: as for `quantize`.
        options: the ways by name.

    Raises:
        ConfigError, DataError: as for `quantize`.
    """
    found = dict[str, Price]()
    with tempfile.TemporaryDirectory(prefix="easyllm-quantize-") as folder:
        for number, (name, its) in enumerate(options.items()):
            target = Path(folder) / (f"{number}.gguf" if its.is_gguf else str(number))
            found[name] = quantize(source, target, its, adapter=adapter, keep=True)
    return found


def variants(names: Sequence[str], options: JsonObject) -> dict[str, QuantizeOptions]:
    """Returns the options of each method or GGUF type, with those that it shares with the others.

    Args:
        names: methods and GGUF types.
        options: what was set for all; a variant ignores what has no effect on it.

    Raises:
        ConfigError: a name is not known.
    """
    known = [*METHODS, *BITSANDBYTES, *TYPES]
    found = dict[str, QuantizeOptions]()
    for name in names:
        if name not in known:
            raise ConfigError(
                f"{name!r} is neither a method nor a GGUF type{suggest(name, known)}; use "
                f"{', '.join(known)}"
            )
        own = {"type": name} if name in TYPES else {"method": name}
        found[name] = QuantizeOptions.with_effect(own, options)
    return found


def _check_types(options: QuantizeOptions, types: Sequence[str]) -> None:
    """Checks the GGUF types that are asked for.

    Raises:
        ConfigError: one is not known.
    """
    asked = [str(options.type), *(value for _, value in options.overrides() if value != FULL)]
    for type in asked:
        if type not in types:
            raise ConfigError(
                f"GGUF type {type!r} is not known{suggest(type, types)}; use {', '.join(types)}"
            )


def _source_notes(opened: OpenSource) -> list[str]:
    if opened.gguf is not None and opened.keeps_blocks():
        return [f"{opened.path} is a GGUF file, whose quantized weights were dequantized"]
    if opened.packed is not None:
        return [f"the {opened.packed.name} weights of {opened.path} were dequantized"]
    return []


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
    adapter: Path | None

    def __post_init__(self) -> None:
        names = [name for name, _ in self.model.weight_modules()]
        self.options.check_overrides(names)
        if not self.options.is_gguf and self.options.scheme is None:
            self._quantizer().check(self.model)

    def calibration(self) -> Calibration | None:
        """Returns the calibration text; None if the method needs none."""
        options = self.options
        if options.is_gguf:
            searched = set(TYPES) - {"q8_0"}  # 8 bits need no search
            asked = {options.type, *(value for _, value in options.overrides())}
            needed = options.importance and bool(asked & searched)
        elif options.scheme is not None:
            needed = False
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

    def write(self, calibrated: Calibration | None, path: Path) -> list[str]:
        """Quantizes the model and writes it to `path`; returns what the user should know."""
        return (
            self._gguf(calibrated, path) if self.options.is_gguf else self._folder(calibrated, path)
        )

    def _gguf(self, calibrated: Calibration | None, path: Path) -> list[str]:
        importance, kind = None, str(self.options.type)
        if calibrated is not None:
            with self._progress("calibrating") as progress:
                importance = importance_matrix(
                    self.model, calibrated.sequences, done=lambda _: progress.advance(1)
                )
        written = save_gguf(
            self.model,
            path,
            type=kind,
            tokenizer=self.tokenizer,
            importance=importance,
            overrides=[(p, "f16" if v == FULL else v) for p, v in self.options.overrides()],
        )
        if not written.fallbacks:
            return []
        kinds = sorted(set(written.fallbacks.values()))
        return [
            f"{len(written.fallbacks)} tensors, such as {next(iter(written.fallbacks))}, are "
            f"{' or '.join(kinds)}: their width or their part in the model does not suit {kind}"
        ]

    def _folder(self, calibrated: Calibration | None, path: Path) -> list[str]:
        if self.options.scheme is not None:
            results, notes = self._blockwise(self.options.scheme), list[str]()
        else:
            results, notes = self._uniform(calibrated)
        manifest = Manifest.create(
            "quantize",
            config=self._described(calibrated),
            inputs=self._inputs(),
            results=results,
        )
        save_model(
            self.model.to(parse_dtype(self.options.dtype)),
            path,
            end_ids=() if self.adapter is None else read_end_ids(self.adapter),
            tokenizer=self.tokenizer,
            extra_files={MANIFEST_FILE: manifest.model_dump(mode="json")},
        )
        return notes

    def _uniform(self, calibrated: Calibration | None) -> tuple[JsonObject, list[str]]:
        """Quantizes the linears to grids; returns the manifest's figures and notes."""
        sequences = () if calibrated is None else calibrated.sequences
        files = None if calibrated is None else self._layer_files(calibrated)
        if files is not None and files.count:
            sys.stderr.write(f"resuming: {files.count} layers are finished in {files.folder}\n")
        with self._progress("quantizing") as progress:
            report = self._quantizer().run(
                self.model, sequences, files=files, done=lambda _: progress.advance(1)
            )
        if files is not None:
            files.remove()
        figures: JsonObject = {"linears": [asdict(linear) for linear in report.linears]}
        unreached = report.unreached
        if not unreached:
            return figures, []
        return figures, [
            f"{len(unreached)} linears, such as {unreached[0]}, were reached by no calibration "
            "token and rounded to nearest; use more calibration text"
        ]

    def _layer_files(self, calibrated: Calibration) -> LayerFiles:
        """Returns the finished layers of this quantization, next to its target."""
        options = self.options.model_dump(mode="json", exclude={"text", "dtype", "dequantize"})
        key = hash_value([options, calibrated.sha256, self._inputs()])
        return LayerFiles(self.target.with_name(f"{self.target.name}.partial"), key)

    def _inputs(self) -> dict[str, str]:
        inputs = {"model": hash_path(locate(self.source))}
        return inputs if self.adapter is None else inputs | {"adapter": hash_path(self.adapter)}

    def _blockwise(self, scheme: str) -> JsonObject:
        """Quantizes the linears as bitsandbytes does; returns the manifest's figures."""
        format = find_scheme(scheme)
        full = [pattern for pattern, value in self.options.overrides() if value == FULL]
        chosen = {
            name: layer
            for name, (layer, its) in quantizable(self.model, scheme).items()
            if its is format and not any(name_matches(name[: -len(".weight")], p) for p in full)
        }
        with Progress("quantizing", total=len(chosen), unit="linear") as progress:
            for name, layer in chosen.items():
                layer.store(quantize_weight(layer.storage.dense(), format, name))
                progress.advance(1)
        return {"linears": list(chosen)}

    def _quantizer(self) -> LayerQuantizer:
        layout = UNIFORM[self.options.file_format]
        settings = {"act_order": True} if self.options.act_order else {}
        return LayerQuantizer(
            method=find_method(self.options.method, **settings),
            spec_of=self.options.spec_of,
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


__all__ = ["Price", "QuantizeOptions", "compare", "quantize", "variants"]
