"""Quantizing a model to files: calibration, quantization, saving, and what it costs."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from easyllm.adapters import check_mergeable, merge, read_adapter
from easyllm.core.atomic import check_output_free, unfinished
from easyllm.core.errors import ConfigError, suggest
from easyllm.core.json_types import JsonObject
from easyllm.models import add_adapter, open_source
from easyllm.models.full_weights import check_finite, to_full_weights
from easyllm.models.load import OpenSource
from easyllm.pipeline.quantize_memory import check_memory
from easyllm.pipeline.quantize_options import BITSANDBYTES, MAX_KL, QuantizeOptions
from easyllm.pipeline.quantize_price import Original, Price, measure, measure_original
from easyllm.pipeline.quantize_work import QuantizeWork, calibration_text
from easyllm.quant.gguf_blocks import TYPES
from easyllm.quant.methods import METHODS
from easyllm.verify.export_gate import GateError
from easyllm.verify.gate_text import gate_text


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
    price, _ = _quantize(source, target, options, adapter, max_kl=max_kl, keep=keep)
    return price


def _quantize(
    source: str,
    target: Path,
    options: QuantizeOptions,
    adapter: Path | None,
    *,
    max_kl: float = MAX_KL,
    keep: bool,
    original: Original | None = None,
) -> tuple[Price, Original]:
    """Returns what quantization costs, and the original it was compared with.

    Args:
        original: the original, if it was measured before.
    """
    opened, predicted = _opened(source, target, options, adapter)
    tokenizer = opened.tokenizer()
    text = gate_text(
        tokenizer,
        vocab_size=opened.config.vocab_size,
        max_seq_len=opened.config.max_seq_len,
        path=None if options.text is None else Path(options.text),
    )
    calibrated = calibration_text(options, tokenizer, longest=opened.config.max_seq_len)
    file = None if adapter is None else read_adapter(adapter)
    model = to_full_weights(opened.model(torch.float32, torch.device("cpu")))
    if file is not None:
        check_mergeable(add_adapter(model, file, base=source))
    check_finite(model, source)
    work = QuantizeWork(source, target, options, model, tokenizer, adapter)
    work.results["predicted_peak_bytes"] = predicted
    if original is None:
        original = measure_original(model, tokenizer, text)
    elif model.is_adapted:
        merge(model)
    del model
    begin = time.perf_counter()
    work.quantize(calibrated)
    with unfinished(target) as made:
        work.save(made)
        seconds = time.perf_counter() - begin
        price = measure(
            made,
            original,
            tokenizer,
            file_format=options.file_format,
            seconds=seconds,
            notes=[*_source_notes(opened), *work.notes],
        )
        complaint = _complaint(price, max_kl)
        if complaint is not None and not keep:
            raise GateError(
                f"{complaint}; nothing was written to {str(target)!r}: use more bits or another "
                "method, allow it with --max-kl, or keep the result with --keep",
                price.gate,
            )
    work.finish()
    return replace(price, path=target, complaint=complaint), original


def _opened(
    source: str, target: Path, options: QuantizeOptions, adapter: Path | None
) -> tuple[OpenSource, int]:
    """Returns the opened source and the predicted peak of the process in bytes.

    What does not fit is told here, before any weights are read.

    Raises:
        ConfigError, CheckpointError: as for `quantize`; or the model does not fit into memory.
        OutputError: the target exists or cannot be written.
    """
    _check_target(target, options)
    check_output_free(target)
    opened = open_source(source)
    _check_source(opened, options)
    predicted = check_memory(opened.config, options)
    QuantizeWork(source, target, options, opened.skeleton(), opened.tokenizer(), adapter)
    return opened, predicted


def _check_target(target: Path, options: QuantizeOptions) -> None:
    """Checks that the name of the target suits the format.

    Raises:
        ConfigError: it does not.
    """
    if options.is_gguf and target.suffix != ".gguf":
        raise ConfigError(
            f"type {options.type} is written as a GGUF file, but {str(target)!r} does not end in "
            ".gguf; add it"
        )
    if not options.is_gguf and target.suffix == ".gguf":
        raise ConfigError(
            f"format {options.file_format} is written as a folder, but {str(target)!r} ends in "
            ".gguf; name a folder, or set type for a GGUF file"
        )


def _check_source(opened: OpenSource, options: QuantizeOptions) -> None:
    """Checks that the source may be quantized.

    Raises:
        ConfigError: it is quantized already, or need not be dequantized.
    """
    if opened.packed is not None and not options.dequantize:
        raise ConfigError(
            f"the weights of {opened.path} are already quantized as {opened.packed.name}; start "
            "from the original, or add --dequantize to round the dequantized weights again, which "
            "adds to their error"
        )
    if options.dequantize and opened.packed is None and not opened.keeps_blocks():
        raise ConfigError(f"the weights of {opened.path} are not quantized; leave out --dequantize")


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
    source: str,
    options: Mapping[str, QuantizeOptions],
    *,
    adapter: Path | None = None,
    begun: Callable[[str], None] = lambda _: None,
) -> dict[str, Price]:
    """Quantizes a model in several ways, each to temporary files, and returns what each costs.

    Args:
        source, adapter: as for `quantize`.
        options: the ways by name.
        begun: called with the name of each way before it is tried.

    Raises:
        ConfigError, DataError: as for `quantize`.
    """
    found = dict[str, Price]()
    original: Original | None = None
    with tempfile.TemporaryDirectory(prefix="easyllm-quantize-") as folder:
        targets = {
            name: Path(folder) / (f"{number}.gguf" if its.is_gguf else str(number))
            for number, (name, its) in enumerate(options.items())
        }
        for name, its in options.items():  # the last one's mistake, too, before the first is tried
            _opened(source, targets[name], its, adapter)
        for name, its in options.items():
            begun(name)
            found[name], original = _quantize(
                source, targets[name], its, adapter, keep=True, original=original
            )
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
    if not names:
        raise ConfigError(f"--compare names nothing to compare; use some of {', '.join(known)}")
    found, used = dict[str, QuantizeOptions](), set[str]()
    for name in names:
        if name not in known:
            raise ConfigError(
                f"{name!r} is neither a method nor a GGUF type{suggest(name, known)}; use "
                f"{', '.join(known)}"
            )
        own = {"type": name} if name in TYPES else {"method": name}
        found[name] = QuantizeOptions.with_effect(own, options)
        used |= found[name].model_fields_set - own.keys()
    for key, value in options.items():
        default = QuantizeOptions.model_fields[key].default
        if value not in (None, default) and key not in used:
            raise ConfigError(f"{key} has no effect on any of {', '.join(names)}; remove it")
    return found


def _source_notes(opened: OpenSource) -> list[str]:
    if opened.gguf is not None and opened.keeps_blocks():
        return [f"{opened.path} is a GGUF file, whose quantized weights were dequantized"]
    if opened.packed is not None:
        return [f"the {opened.packed.name} weights of {opened.path} were dequantized"]
    return []


__all__ = ["Price", "QuantizeOptions", "compare", "quantize", "variants"]
