"""One small file a family: reader and writer of its `config.json`, its names on disk, its sizes.

To add one: write the file, add its `FAMILY` to the tuple below.
"""

from easyllm.core.errors import CheckpointError, suggest
from easyllm.models.families import (
    easyllm,
    gemma,
    glm4,
    gpt2,
    llama,
    mistral,
    mixtral,
    qwen2,
    qwen3,
    qwen_moe,
)
from easyllm.models.families.family import Family

_ALL = (
    gpt2.FAMILY,
    llama.FAMILY,
    mistral.FAMILY,
    mixtral.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    *qwen_moe.FAMILIES,
    *glm4.FAMILIES,
    *gemma.FAMILIES,
    easyllm.FAMILY,
)
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
_BY_TYPE = {model_type: family for family in _ALL for model_type in family.model_types}


def family_of(model_type: object) -> Family:
    """The family that reads a `config.json` of this `model_type`.

    Raises:
        CheckpointError: no family does.
    """
    if isinstance(model_type, str) and model_type in _BY_TYPE:
        return _BY_TYPE[model_type]
    raise CheckpointError(
        f"model_type {model_type!r} is not known{suggest(str(model_type), _BY_TYPE)}; "
        f"known are {', '.join(sorted(_BY_TYPE))} (code that comes with a checkpoint is never run)"
    )


__all__ = ["FAMILIES", "Family", "family_of"]
