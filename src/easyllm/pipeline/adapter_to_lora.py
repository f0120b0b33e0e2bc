"""Converting the folder of an adapter to that of a LoRA adapter."""

import shutil
from pathlib import Path

from easyllm.adapters import Conversion, read_adapter, save_adapter, to_lora
from easyllm.adapters.peft_format import CONFIG
from easyllm.core.atomic import atomic_directory, write_json
from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonObject
from easyllm.core.manifest import MANIFEST_FILE, Manifest, hash_path
from easyllm.models import hf_module_name, load_model, locate, split_adapter

KEPT = ("*.json", "*.jinja", "*.model", "*.txt")
"""Further files of an adapter's folder that are copied: end tokens, tokenizer, chat template."""


def adapter_to_lora(
    source: str | Path, folder: Path, rank: int, *, adapter: Path | None = None
) -> Conversion:
    """Converts an adapter to LoRA by truncated SVD and saves it in peft's format.

    Args:
        source: the adapter's folder, or its base model if `adapter` is given.
        folder: the folder to write.
        rank: the largest rank of each layer.
        adapter: the adapter's folder, if its configuration does not name the base.

    Returns:
        The conversion, with the error of each layer.

    Raises:
        SourceError: `source` does not exist.
        ConfigError: `source` is not an adapter, or the adapter cannot become LoRA.
        OutputError: `folder` is not empty or cannot be written.
    """
    base, found = split_adapter(source, adapter)
    if found is None:
        locate(source)
        raise ConfigError(
            f"--lora-rank converts an adapter, but {str(source)!r} is a model; give the folder of "
            "an adapter"
        )
    with atomic_directory(folder) as work:
        model = load_model(base, dtype="float32", adapter=found)
        converted = to_lora(model, rank)
        named = read_adapter(found).description.get("base_model_name_or_path")
        save_adapter(
            model,
            work,
            module_name=hf_module_name(model),
            base=str(base) if adapter is not None or not named else str(named),
        )
        for file in (file for pattern in KEPT for file in sorted(found.glob(pattern))):
            if file.name not in (CONFIG, MANIFEST_FILE):
                shutil.copyfile(file, work / file.name)
        manifest = Manifest.create(
            "convert",
            config={"model": str(base), "adapter": str(found), "lora_rank": rank},
            inputs={"model": hash_path(locate(base)), "adapter": hash_path(found)},
            results=figures(converted),
        )
        write_json(work / MANIFEST_FILE, manifest.model_dump(mode="json"))
    return converted


def figures(converted: Conversion) -> JsonObject:
    """Returns the relative Frobenius errors of a conversion, in total and of each layer."""
    layers = {
        name: {"rank": each.rank, "error": each.error} for name, each in converted.factors.items()
    }
    return {"error": converted.error, "layers": layers}


__all__ = ["adapter_to_lora", "figures"]
