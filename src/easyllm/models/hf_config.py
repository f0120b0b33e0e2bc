"""`config.json` and `ModelConfig`: the family's own part, and what every family shares.

Shared are the head of labels (an architecture `...ForSequenceClassification` with `id2label`) and, a key of ours that
others ignore, `prompt_mask`.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from easyllm.core.config import first_difference
from easyllm.core.errors import CheckpointError
from easyllm.models.families import family_named, family_of
from easyllm.models.families.family import read_token_ids
from easyllm.nn.config import ModelConfig

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
CLASSIFIER = "ForSequenceClassification"
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")


def read_files(folder: Path) -> dict[str, Any]:
    """`config.json`, with the end tokens of `generation_config.json` where that names them.

    Raises:
        CheckpointError: a file is not JSON.
    """
    config = _read_json(folder / CONFIG_FILE)
    if (folder / GENERATION_FILE).is_file():
        generation = _read_json(folder / GENERATION_FILE)
        if generation.get("eos_token_id") is not None:
            config["eos_token_id"] = generation["eos_token_id"]
    return config


def read_end_ids(folder: Path) -> tuple[int, ...]:
    """Ids that end a generation according to the folder's `generation_config.json`; none where it has no such file.

    Raises:
        CheckpointError: the file is not JSON.
    """
    if not (folder / GENERATION_FILE).is_file():
        return ()
    return tuple(read_token_ids(_read_json(folder / GENERATION_FILE))["eos_token_ids"])


def with_end_ids(config: ModelConfig, ids: Iterable[int]) -> ModelConfig:
    """The configuration of a model that also ends a generation at `ids`, after those that ended it before."""
    ends = tuple(dict.fromkeys((*config.eos_token_ids, *ids)))
    return config if ends == config.eos_token_ids else config.changed(eos_token_ids=ends)


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """What `config.json` describes.

    Raises:
        CheckpointError: no family reads it, or it sets an option that is not implemented.
    """
    config = family_of(hf.get("model_type")).read_config(hf)
    shared: dict[str, Any] = {}
    if str((hf.get("architectures") or [""])[0]).endswith(CLASSIFIER):
        labels = hf.get("id2label")
        shared["num_labels"] = (
            len(labels) if isinstance(labels, Mapping) else hf.get("num_labels", 2)
        )
    if hf.get("prompt_mask") is not None:
        shared["prompt_mask"] = hf["prompt_mask"]
    return config.changed(**shared) if shared else config


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` that describes a model.

    Raises:
        CheckpointError: the layout of its family has no words for it (its parts were changed).
    """
    family_named(config.family)
    try:
        hf = _write(config)
        lost = first_difference(read_config(hf).model_dump(), config.model_dump())
    except CheckpointError as error:  # a part that the family does not have
        lost = str(error)
    if lost:
        raise CheckpointError(
            f"the layout of {config.family!r} cannot express this model ({lost}); "
            "set its family to 'easyllm', whose layout expresses every model"
        )
    return hf


def _write(config: ModelConfig) -> dict[str, Any]:
    hf = family_named(config.family).write_config(config)
    if config.prompt_mask != "causal":
        hf["prompt_mask"] = config.prompt_mask
    if config.num_labels is not None:
        labels = {str(i): f"LABEL_{i}" for i in range(config.num_labels)}
        hf |= {
            "architectures": [_classifier(name) for name in hf["architectures"]],
            "num_labels": config.num_labels,
            "id2label": labels,
            "label2id": {name: int(number) for number, name in labels.items()},
        }
    return hf


def _classifier(architecture: str) -> str:
    for ending in LANGUAGE_MODELS:
        architecture = architecture.replace(ending, CLASSIFIER)
    return architecture


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); copy the checkpoint again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object; copy the checkpoint again")
    return content
