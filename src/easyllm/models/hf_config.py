"""Conversion between `config.json` and `ModelConfig`.

Each family converts its own keys. This module adds the keys that all families share: the
classification head (an architecture `...ForSequenceClassification` with `id2label`) and
`prompt_mask`, an Easyllm key that other tools ignore.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from easyllm.checkpoint.store import read_object
from easyllm.core.config import first_difference
from easyllm.core.errors import CheckpointError
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.models.families import family_named, family_of
from easyllm.models.families.family import read_token_ids
from easyllm.nn.config import ModelConfig

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
CLASSIFIER = "ForSequenceClassification"
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")
_REMEDY = "copy the checkpoint again"


def read_files(folder: Path) -> JsonObject:
    """Reads `config.json`, with the EOS ids of `generation_config.json` taking precedence.

    Raises:
        CheckpointError: a file is not JSON.
    """
    config = read_object(folder / CONFIG_FILE, _REMEDY)
    if (folder / GENERATION_FILE).is_file():
        generation = read_object(folder / GENERATION_FILE, _REMEDY)
        if generation.get("eos_token_id") is not None:
            config["eos_token_id"] = generation["eos_token_id"]
    return config


def read_end_ids(folder: Path) -> tuple[int, ...]:
    """Returns the EOS ids in the folder's `generation_config.json`; empty without such a file.

    Raises:
        CheckpointError: the file is not JSON.
    """
    if not (folder / GENERATION_FILE).is_file():
        return ()
    generation = read_object(folder / GENERATION_FILE, _REMEDY)
    return tuple(read_token_ids(generation)["eos_token_ids"])


def with_end_ids(config: ModelConfig, ids: Iterable[int]) -> ModelConfig:
    """Returns `config` with `ids` appended to its EOS ids, without duplicates."""
    ends = tuple(dict.fromkeys((*config.eos_token_ids, *ids)))
    return config if ends == config.eos_token_ids else config.changed(eos_token_ids=ends)


def read_config(hf: JsonMapping) -> ModelConfig:
    """Returns the model configuration that the values of a `config.json` describe.

    Raises:
        CheckpointError: its `model_type` is unknown, or it sets an option that is not implemented.
    """
    try:
        family = family_of(hf.get("model_type"))
    except CheckpointError as error:
        raise _unknown_code(hf, error) from None
    config = family.read_config(hf)
    shared: JsonObject = {}
    if str((hf.get("architectures") or [""])[0]).endswith(CLASSIFIER):
        labels = hf.get("id2label")
        shared["num_labels"] = (
            len(labels) if isinstance(labels, Mapping) else hf.get("num_labels", 2)
        )
    if hf.get("prompt_mask") is not None:
        shared["prompt_mask"] = hf["prompt_mask"]
    return config.changed(**shared) if shared else config


def _unknown_code(hf: JsonMapping, error: CheckpointError) -> CheckpointError:
    """Returns the error for an unknown family, which names the class that its code would define."""
    classes = hf.get("auto_map")
    named = (
        classes.get("AutoModelForCausalLM") or classes.get("AutoModel")
        if (isinstance(classes, Mapping))
        else None
    )
    if not isinstance(named, str):
        return error
    return CheckpointError(
        f"{error}; its auto_map names {named}, code that would have to be written as a family: a "
        "reader of its config.json and a map of its tensors (register_family)"
    )


def write_config(config: ModelConfig) -> JsonObject:
    """Returns the `config.json` values that describe a model.

    Raises:
        CheckpointError: the family's Hugging Face format cannot represent the model (for example
            because its parts were changed).
    """
    family_named(config.family)
    try:
        hf = _write(config)
        lost = first_difference(read_config(hf).model_dump(), config.model_dump())
    except CheckpointError as error:  # the model has a part that the family does not support
        lost = str(error)
    if lost:
        raise CheckpointError(
            f"the Hugging Face format of {config.family!r} cannot represent this model ({lost}); "
            "set its family to 'easyllm', whose format can represent every model"
        )
    return hf


def _write(config: ModelConfig) -> JsonObject:
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
