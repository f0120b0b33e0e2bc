"""Sampling parameters that a model recommends: `generation_config.json`, or keys of a GGUF file."""

from collections.abc import Mapping
from pathlib import Path

from easyllm.checkpoint.store import read_object
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.models.hf_config import GENERATION_FILE

KEYS: Mapping[str, type] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "typical_p": float,
    "repetition_penalty": float,
}
"""Parameters that are honoured, with their types."""
_GGUF_KEYS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_p": "top_p",
    "general.sampling.top_k": "top_k",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


def read_sampling_defaults(path: Path, metadata: JsonMapping | None = None) -> JsonObject:
    """Returns the sampling parameters that a model recommends, by the names of `SamplingParams`.

    `do_sample` is not read: it is false in many files that nevertheless recommend a temperature.
    Values outside their range, or of another type, are left out.

    Args:
        path: the model's folder; without `generation_config.json`, nothing is recommended.
        metadata: the metadata of a GGUF file, which are read instead.

    Raises:
        CheckpointError: the file is not JSON.
    """
    if metadata is not None:
        given = {
            name: metadata[key] for key, name in _GGUF_KEYS.items() if metadata.get(key) is not None
        }
    elif (path / GENERATION_FILE).is_file():
        given = read_object(path / GENERATION_FILE, "copy the checkpoint again")
    else:
        return {}
    return {name: kind(given[name]) for name, kind in KEYS.items() if _is_valid(name, given)}


def _is_valid(name: str, given: JsonMapping) -> bool:
    value = given.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if name == "top_k":
        return isinstance(value, int) and 0 <= value < 2**31
    if name == "temperature":
        return 0 <= value <= 2
    if name == "repetition_penalty":
        return 0.01 <= value <= 100
    lowest = 0 if name == "min_p" else 1e-6
    return lowest <= value <= 1
