"""Adapters on disk, in the layout of `peft`: `adapter_config.json` and `adapter_model.safetensors`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from easyllm.adapters.attach import adapted, attach
from easyllm.adapters.lora import LoRAConfig
from easyllm.checkpoint.store import read_tensors, write_tensors
from easyllm.core.atomic import atomic_directory, write_json
from easyllm.core.errors import CheckpointError
from easyllm.nn.decoder import Decoder

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."

ModuleName = Callable[[str], str]


def save_adapter(
    model: Decoder,
    folder: Path,
    config: LoRAConfig,
    *,
    module_name: ModuleName,
    base: str,
    replace: bool = False,
) -> Path:
    """Writes the model's adapters; `peft` and `load_adapter` read them.

    Args:
        module_name: what HF calls one of our linears (`models.hf_module_name(model)`).
        base: the base model's source, for the record.

    Raises:
        OutputError: the folder holds something, or cannot be written.
    """
    names = {name: module_name(name) for name, _, _ in adapted(model)}
    tensors = {}
    for name, _, adapter in adapted(model):
        tensors[f"{_PREFIX}{names[name]}.lora_A.weight"] = adapter.lora_A
        tensors[f"{_PREFIX}{names[name]}.lora_B.weight"] = adapter.lora_B
    description: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted({name.rsplit(".", 1)[1] for name in names.values()}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with atomic_directory(folder, replace=replace) as work:
        write_tensors(work / WEIGHTS, tensors, {"format": "pt"})
        write_json(work / CONFIG, description)
    return folder


def load_adapter(model: Decoder, folder: Path, *, module_name: ModuleName) -> Decoder:
    """Attaches the adapters a folder holds.

    Raises:
        CheckpointError: the folder holds no LoRA adapter, or one for another model.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"folder {str(folder)!r} holds no {CONFIG}; name the folder an adapter was saved to"
        )
    try:
        description = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        config = LoRAConfig(
            rank=description["r"],
            alpha=description["lora_alpha"],
            targets=tuple(description["target_modules"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG} is no LoRA configuration ({error})") from None
    if description.get("peft_type") != "LORA" or description.get("use_dora"):
        raise CheckpointError(
            f"{folder / CONFIG} is no plain LoRA adapter, which is all that is read"
        )
    tensors, _ = read_tensors(folder / WEIGHTS)
    attach(model, config)
    expected = {}
    for name, _, adapter in adapted(model):
        stem = f"{_PREFIX}{module_name(name)}"
        expected[f"{stem}.lora_A.weight"] = adapter.lora_A
        expected[f"{stem}.lora_B.weight"] = adapter.lora_B
    wrong = set(expected) ^ set(tensors)
    wrong |= {n for n in set(expected) & set(tensors) if expected[n].shape != tensors[n].shape}
    if wrong:
        raise CheckpointError(
            f"the adapter in {str(folder)!r} does not fit the model ({len(wrong)} tensors differ, "
            f"such as {sorted(wrong)[0]}); use the model it was trained on"
        )
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(tensors[name])
    return model.requires_grad_(False)
