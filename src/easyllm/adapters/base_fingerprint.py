"""A fingerprint of the base model in an adapter file, to recognise another base of equal shape.

It consists of hashes of the first values of a few parameters, as bf16, so that it does not depend
on the dtype the model is loaded in. Quantized weights and fully trained parameters have no part in
it. It has its own file, because peft warns about unknown keys of `adapter_config.json`.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from easyllm.adapters.adapter_set import base_parameter_names
from easyllm.nn.decoder import Decoder

FINGERPRINT_FILE = "base_fingerprint.json"
NUM_PARAMETERS, NUM_VALUES = 8, 4096
"""Parameters that are hashed, evenly spaced in the model, and values of each."""


def fingerprint(model: Decoder, *, without: Collection[str] = ()) -> dict[str, str]:
    """Returns hashes of some of the base's parameters, by our names.

    Args:
        model: the base model, with or without adapters.
        without: parameters that differ from the base's.
    """
    names = [
        name
        for name in base_parameter_names(model)
        if name not in set(without) and not name.startswith("score.")  # belongs to the adapter
    ]
    matrices = [name for name in names if model.get_parameter(name).ndim > 1]
    chosen = dict.fromkeys((*_spread(matrices), *_spread(names)))
    return {name: _hash(model, name) for name in chosen}


def differing(model: Decoder, recorded: Mapping[str, str]) -> str | None:
    """Returns the name of a parameter that differs from a recorded fingerprint; None if none does.

    Parameters that the model does not have in full (quantized weights) are not compared.
    """
    names = set(base_parameter_names(model))
    different = (n for n, value in recorded.items() if n in names and _hash(model, n) != value)
    return next(different, None)


def read_fingerprint(folder: Path) -> dict[str, str]:
    """Returns the fingerprint stored with an adapter; empty if there is none that can be read."""
    try:
        found = json.loads((folder / FINGERPRINT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(n): str(v) for n, v in found.items()} if isinstance(found, dict) else {}


def _spread(names: list[str]) -> list[str]:
    """Returns `NUM_PARAMETERS / 2` of the names, evenly spaced, the first and last included."""
    count = min(NUM_PARAMETERS // 2, len(names))
    last = max(count - 1, 1)
    return [names[(len(names) - 1) * n // last] for n in range(count)]


def _hash(model: Decoder, name: str) -> str:
    values = model.get_parameter(name).detach().reshape(-1)[:NUM_VALUES]
    raw = values.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw).hexdigest()[:16]


__all__ = ["FINGERPRINT_FILE", "differing", "fingerprint", "read_fingerprint"]
