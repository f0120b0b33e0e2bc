"""Saving models as a Hugging Face folder."""

from collections.abc import Callable, Mapping, Sequence
from operator import methodcaller
from pathlib import Path

import torch
from torch import Tensor

from easyllm.checkpoint.store import write_model_weights
from easyllm.checkpoint.stream import stream_model_weights
from easyllm.core.atomic import atomic_directory, write_json
from easyllm.core.errors import CheckpointError
from easyllm.core.json_types import JsonObject
from easyllm.models.hf_config import CONFIG_FILE, GENERATION_FILE, with_end_ids, write_config
from easyllm.models.hf_names import hf_module_name, keymap_of
from easyllm.nn.config import ModelConfig
from easyllm.nn.decoder import Decoder
from easyllm.nn.linear import Linear
from easyllm.quant import FORMATS, LAYOUTS
from easyllm.tokenizer.tokenizer import Tokenizer


def save_model(
    model: Decoder,
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    end_ids: Sequence[int] = (),
    replace: bool = False,
    extra_files: JsonObject | None = None,
) -> Path:
    """Saves the model atomically as a Hugging Face folder that `transformers` loads unchanged.

    Args:
        model: the model to save.
        folder: the folder to write.
        tokenizer: saved next to the weights, including its chat template.
        end_ids: additional EOS ids (the end-of-turn tokens the model was fine-tuned on).
        replace: whether a non-empty folder may be replaced.
        extra_files: additional JSON files by name (a manifest, for example).

    Returns:
        The path of the folder.

    Raises:
        OutputError: the folder is not empty, or cannot be written.
        CheckpointError: the model has an adapter, the family's Hugging Face format cannot represent
            the model, or its weights are quantized in a format that cannot be saved.
    """
    if model.is_adapted:
        raise CheckpointError(
            "the model has an adapter, which the Hugging Face model format cannot store; merge it "
            "first, or save it with save_adapter"
        )
    config = _described(model.config, model.dtype, end_ids)
    packed, quantization = _packed_tensors(model)
    if quantization is not None:
        config["quantization_config"] = quantization
    tensors = keymap_of(model.config).to_file(_full_tensors(model), packed)
    with atomic_directory(Path(folder), replace=replace) as work:
        write_model_weights(work, tensors)
        _write_files(work, config, tokenizer, extra_files)
    return Path(folder)


def save_streamed(
    empty: Decoder,
    read: Callable[[str], Tensor],
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer: Tokenizer | None = None,
    end_ids: Sequence[int] = (),
    extra_files: JsonObject | None = None,
) -> Path:
    """Saves a model as `save_model` does, with one tensor of a file in memory at a time.

    Args:
        empty: the model on the device `meta`, without values.
        read: returns a parameter by name, in any dtype.
        folder: the folder to write; must be empty or absent.
        dtype: dtype of the saved weights.
        tokenizer, end_ids, extra_files: as for `save_model`.

    Raises:
        OutputError: the folder is not empty, or cannot be written.
        CheckpointError: the family's format cannot represent the model.
    """
    state = _full_tensors(empty)
    bindings = {b.theirs: b for b in keymap_of(empty.config).bindings(state)}
    forms = {
        name: b.rule.join([state[ours] for ours in b.ours]).to(dtype)
        for name, b in bindings.items()
    }

    def value(name: str) -> Tensor:
        binding = bindings[name]
        return binding.rule.join([read(ours) for ours in binding.ours]).to(dtype)

    with atomic_directory(Path(folder)) as work:
        stream_model_weights(work, forms, value)
        _write_files(work, _described(empty.config, dtype, end_ids), tokenizer, extra_files)
    return Path(folder)


def _full_tensors(model: Decoder) -> dict[str, Tensor]:
    return {name: t for name, t in model.state_dict().items() if ".storage." not in f".{name}"}


def _described(config: ModelConfig, dtype: torch.dtype, end_ids: Sequence[int]) -> JsonObject:
    """Returns the contents of `config.json`."""
    name = str(dtype).removeprefix("torch.")
    return write_config(with_end_ids(config, end_ids)) | {"torch_dtype": name}


def _write_files(
    work: Path, config: JsonObject, tokenizer: Tokenizer | None, extra_files: JsonObject | None
) -> None:
    """Writes what a folder contains apart from weights."""
    generation = {
        key: config[key]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        if config.get(key) is not None
    }
    write_json(work / CONFIG_FILE, config)
    write_json(work / GENERATION_FILE, generation)
    if tokenizer is not None:
        tokenizer.save(work)
    for name, value in (extra_files or {}).items():
        write_json(work / name, value)


def _packed_tensors(
    model: Decoder,
) -> tuple[dict[str, Mapping[str, Tensor]], JsonObject | None]:
    """Returns the tensors of quantized weights and the matching `quantization_config`."""
    formats = model.packed_formats()
    if not formats:
        return {}, None
    (name, *others) = sorted(formats)
    format = FORMATS.get(name)
    layout = LAYOUTS.get(name if format is None else format.layout or "")
    if others or (layout is None and (format is None or not format.file_tensors)):
        raise CheckpointError(
            f"weights quantized as {' and '.join([name, *others])} exist only in memory and cannot "
            "be saved in Hugging Face format; save the unquantized model"
        )
    layers = dict(model.weight_modules())
    packed = {n: layer.storage for n, layer in layers.items() if layer.storage.format == name}
    tensors_of = methodcaller("tensors") if layout is None else layout.tensors_of
    tensors = {f"{holder}.weight": tensors_of(storage) for holder, storage in packed.items()}
    if layout is None:
        assert format is not None, "checked above"
        return tensors, {"quant_method": name, **format.file_config}
    names = hf_module_name(model)
    skipped = [n for n, layer in layers.items() if n not in packed and isinstance(layer, Linear)]
    config = layout.config_of(
        {names(holder): storage for holder, storage in packed.items()}, [names(n) for n in skipped]
    )
    return tensors, config
