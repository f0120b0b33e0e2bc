"""The steps of quantizing one model to files: checks, calibration, quantization, saving."""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from easyllm.adapters.targets import name_matches
from easyllm.core.device import parse_dtype, peak_rss_bytes
from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonObject
from easyllm.core.manifest import MANIFEST_FILE, Manifest, hash_path, hash_value
from easyllm.core.progress import Progress
from easyllm.models import locate, save_model
from easyllm.models.full_weights import check_finite
from easyllm.models.gguf_export import check_gguf, save_gguf
from easyllm.models.hf_config import read_end_ids
from easyllm.models.hf_names import keymap_of
from easyllm.nn.decoder import Decoder
from easyllm.nn.linear import Embedding, Linear
from easyllm.nn.moe import ROUTERS
from easyllm.pipeline.calibration import Calibration, calibration
from easyllm.pipeline.quantize_options import DEFAULT_LENGTH, FULL, QuantizeOptions
from easyllm.quant import find_scheme, quantizable, quantize_weight
from easyllm.quant.calibrate import importance_matrix
from easyllm.quant.formats import UNIFORM
from easyllm.quant.gptq_blockwise4 import check_width, quantize_layers
from easyllm.quant.layer_files import LayerFiles
from easyllm.quant.layers import LayerQuantizer, Report
from easyllm.quant.methods import find_method
from easyllm.tokenizer.tokenizer import Tokenizer


def calibration_text(
    options: QuantizeOptions, tokenizer: Tokenizer, *, longest: int
) -> Calibration | None:
    """Returns the calibration text; None if the method needs none.

    Args:
        options: method, number and length of the sequences.
        tokenizer: the model's tokenizer.
        longest: the model's context, in tokens.

    Raises:
        ConfigError: the sequences are longer than the context.
        DataError: the file cannot be read, or there is too little text.
    """
    if not options.needs_text:
        return None
    if options.length > longest and options.length != DEFAULT_LENGTH:
        raise ConfigError(
            f"a calibration sequence of {options.length} tokens is longer than the "
            f"model's context of {longest}; lower length"
        )
    return calibration(
        tokenizer,
        path=None if options.data is None else Path(options.data),
        count=options.samples,
        length=min(options.length, longest),
    )


@dataclass(slots=True)
class QuantizeWork:
    """A model to quantize, and what to quantize it to.

    Attributes:
        source: the model's source.
        target: where the result will be.
        options: method, grid and format.
        model: the model with full weights; quantized in place.
        tokenizer: its tokenizer.
        adapter: the folder of the adapter that is merged first, if any.

    Raises:
        ConfigError: the format cannot hold a linear of the model.
        CheckpointError: the format cannot represent the model or its tokenizer.
    """

    source: str
    target: Path
    options: QuantizeOptions
    model: Decoder
    tokenizer: Tokenizer
    adapter: Path | None

    importance: dict[str, Tensor] | None = field(default=None, init=False)
    calibrated: Calibration | None = field(default=None, init=False)
    results: JsonObject = field(default_factory=dict, init=False)
    notes: list[str] = field(default_factory=list, init=False)
    files: LayerFiles | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        modules = dict(self.model.weight_modules())
        names = [name for name in modules if not name.endswith(ROUTERS)]
        if self.options.is_gguf:
            self.options.check_overrides(names)
            merged = self.adapter is not None  # it is merged before the file is written
            check_gguf(self.model, to_be_merged=merged, **self._gguf_options())
            return
        linears = [name for name in names if name.startswith("layers.")]
        self.options.check_overrides(linears)
        keymap = keymap_of(self.model.config)
        for name in linears:
            keymap.packed_tensors(f"{name}.weight", ("weight",))
        if self.options.scheme is None:
            self._quantizer().check(self.model)
        elif self.options.needs_text:
            self._gptq_linears(self.options.scheme)
        if self.options.scheme is not None and not self._blockwise_linears(self.options.scheme):
            raise ConfigError("no linear of the model is to be quantized; change --override")

    def quantize(self, calibrated: Calibration | None) -> None:
        """Quantizes the model in memory; for GGUF, computes the importance of inputs."""
        self.calibrated = calibrated
        if self.options.is_gguf:
            if calibrated is not None:
                with self._progress("calibrating") as progress:
                    self.importance = importance_matrix(
                        self.model, calibrated.sequences, done=lambda _: progress.advance(1)
                    )
        elif self.options.scheme is not None:
            if calibrated is None:
                self._blockwise(self.options.scheme)
            else:
                self._gptq_blockwise(self.options.scheme, calibrated)
        else:
            self._uniform(calibrated)

    def save(self, path: Path) -> None:
        """Writes the model to `path`.

        Raises:
            ConfigError: a weight that is not quantized exceeds the range of its dtype.
        """
        if self.options.is_gguf:
            self._save_gguf(path)
            return
        self.results["peak_rss_bytes"] = peak_rss_bytes()
        manifest = Manifest.create(
            "quantize", config=self._described(), inputs=self._inputs(), results=self.results
        )
        model = self.model.to(parse_dtype(self.options.dtype))
        check_finite(model, f"{self.source} as {self.options.dtype}")
        save_model(
            model,
            path,
            end_ids=() if self.adapter is None else read_end_ids(self.adapter),
            tokenizer=self.tokenizer,
            extra_files={MANIFEST_FILE: manifest.model_dump(mode="json")},
        )

    def finish(self) -> None:
        """Removes the finished layers that were kept for resuming."""
        if self.files is not None:
            self.files.remove()

    def _gguf_options(self) -> dict[str, Any]:
        overrides = [(p, "f16" if v == FULL else v) for p, v in self.options.overrides()]
        type = str(self.options.type)
        return {"type": type, "tokenizer": self.tokenizer, "overrides": overrides}

    def _save_gguf(self, path: Path) -> None:
        written = save_gguf(self.model, path, importance=self.importance, **self._gguf_options())
        if written.fallbacks:
            kinds = sorted(set(written.fallbacks.values()))
            self.notes.append(
                f"{next(iter(written.fallbacks))} and all others that need it "
                f"({len(written.fallbacks)} in all) are {' or '.join(kinds)}: blocks of the type "
                "meant for them do not divide their width (embedding and head get 6 bits or more)"
            )

    def _uniform(self, calibrated: Calibration | None) -> None:
        """Quantizes the linears to grids."""
        sequences = () if calibrated is None else calibrated.sequences
        self.files = None if calibrated is None else self._layer_files(calibrated)
        with self._progress("quantizing") as progress:
            report = self._quantizer().run(
                self.model, sequences, files=self.files, done=lambda _: progress.advance(1)
            )
        self._take(report)

    def _take(self, report: Report) -> None:
        """Keeps what a report says for the manifest and the user."""
        self.results = {"linears": [asdict(linear) for linear in report.linears]}
        if unreached := report.unreached:
            self.notes.append(
                f"{len(unreached)} linears, such as {unreached[0]}, were reached by no calibration "
                "token and rounded to nearest; use more calibration text"
            )

    def _layer_files(self, calibrated: Calibration) -> LayerFiles:
        """Returns the finished layers of this quantization, next to its target."""
        options = self.options.model_dump(mode="json", exclude={"text", "dtype", "dequantize"})
        key = hash_value([options, calibrated.sha256, self._inputs()])
        files = LayerFiles(self.target.with_name(f"{self.target.name}.partial"), key)
        if files.count:
            sys.stderr.write(f"resuming: {files.count} layers are finished in {files.folder}\n")
        return files

    def _inputs(self) -> dict[str, str]:
        inputs = {"model": hash_path(locate(self.source))}
        return inputs if self.adapter is None else inputs | {"adapter": hash_path(self.adapter)}

    def _blockwise_linears(self, scheme: str) -> dict[str, Linear | Embedding]:
        """Returns the layers that are quantized as bitsandbytes does."""
        format = find_scheme(scheme)
        full = [pattern for pattern, value in self.options.overrides() if value == FULL]
        return {
            name: layer
            for name, (layer, its) in quantizable(self.model, scheme).items()
            if its is format and not any(name_matches(name[: -len(".weight")], p) for p in full)
        }

    def _blockwise(self, scheme: str) -> None:
        """Quantizes the linears as bitsandbytes does."""
        format, chosen = find_scheme(scheme), self._blockwise_linears(scheme)
        with Progress("quantizing", total=len(chosen), unit="linear") as progress:
            for name, layer in chosen.items():
                layer.store(quantize_weight(layer.storage.dense(), format, name))
                progress.advance(1)
        self.results = {"linears": list(chosen)}

    def _gptq_blockwise(self, scheme: str, calibrated: Calibration) -> None:
        """Quantizes the linears to the values of bitsandbytes with GPTQ."""
        self.files = self._layer_files(calibrated)
        with self._progress("quantizing") as progress:
            report = quantize_layers(
                self.model,
                calibrated.sequences,
                self._gptq_linears(scheme),
                scheme,
                files=self.files,
                done=lambda _: progress.advance(1),
            )
        self._take(report)

    def _gptq_linears(self, scheme: str) -> dict[str, Linear]:
        """Returns the linears that GPTQ quantizes, by full name.

        Raises:
            ConfigError: the block does not divide the width of one.
        """
        found = {
            name.removesuffix(".weight"): layer
            for name, layer in self._blockwise_linears(scheme).items()
            if isinstance(layer, Linear)
        }
        for name, linear in found.items():
            check_width(name, linear.in_features, scheme)
        return found

    def _quantizer(self) -> LayerQuantizer:
        layout = UNIFORM[self.options.file_format]
        settings = {"static_groups": False} if self.options.act_order else {}
        return LayerQuantizer(
            method=find_method(self.options.method, **settings),
            spec_of=self.options.spec_of,
            store=lambda _, weight: layout.storage(weight, torch.float32),
            unsupported_reason=layout.unsupported_reason,
        )

    def _progress(self, label: str) -> Progress:
        return Progress(label, total=self.model.config.num_layers, unit="layer")

    def _described(self) -> JsonObject:
        found: JsonObject | None = None
        calibrated = self.calibrated
        if calibrated is not None:
            found = {
                "source": calibrated.source,
                "sequences": len(calibrated.sequences),
                "tokens": calibrated.num_tokens,
                "sha256": calibrated.sha256,
            }
        options = self.options.model_dump(mode="json") | {"format": self.options.file_format}
        return {"model": self.source, **options, "calibration": found}


__all__ = ["QuantizeWork", "calibration_text"]
