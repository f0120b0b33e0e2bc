"""Saving models as a Hugging Face folder."""

from collections.abc import Mapping, Sequence
from operator import methodcaller
from pathlib import Path

from torch import Tensor

from easyllm.checkpoint.store import write_model_weights
from easyllm.core.atomic import atomic_directory, write_json
from easyllm.core.errors import CheckpointError
from easyllm.core.json_types import JsonObject
from easyllm.models.hf_config import CONFIG_FILE, GENERATION_FILE, with_end_ids, write_config
from easyllm.models.hf_names import hf_module_name, keymap_of
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
    dtype = str(model.dtype).removeprefix("torch.")
    config = write_config(with_end_ids(model.config, end_ids)) | {"torch_dtype": dtype}
    packed, quantization = _packed_tensors(model)
    if quantization is not None:
        config["quantization_config"] = quantization
    full = {name: t for name, t in model.state_dict().items() if ".storage." not in f".{name}"}
    tensors = keymap_of(model.config).to_file(full, packed)
    generation = {
        key: config[key]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        if config.get(key) is not None
    }
    with atomic_directory(Path(folder), replace=replace) as work:
        write_model_weights(work, tensors)
        write_json(work / CONFIG_FILE, config)
        write_json(work / GENERATION_FILE, generation)
        if tokenizer is not None:
            tokenizer.save(work)
        for name, value in (extra_files or {}).items():
            write_json(work / name, value)
    return Path(folder)


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
