"""One small file a family: reader and writer of its `config.json`, its names on disk and in GGUF, its sizes.

To add one: write the file and register its `FAMILY` below; outside this package, `register_family` does the same.
"""

from easyllm.core.errors import CheckpointError, ConfigError, suggest
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
from easyllm.models.families.gguf_layout import GGUFLayout, GGUFMetadata

FAMILIES: dict[str, Family] = {}
"""Every registered family by its name."""


def register_family(family: Family) -> None:
    """Makes a family known: models of it are read, written and built from here on.

    Raises:
        ConfigError: another family has its name, its `model_type` or its GGUF architecture.
    """
    if family.name in FAMILIES:
        raise ConfigError(f"a family {family.name!r} is registered already; choose another name")
    taken = _by_type().keys() & set(family.model_types)
    architectures = family.gguf.architectures if family.gguf else ()
    taken_architectures = _by_architecture().keys() & set(architectures)
    for what, names in (("model_type", taken), ("GGUF architecture", taken_architectures)):
        if names:
            owner = (_by_type() | _by_architecture())[min(names)].name
            raise ConfigError(
                f"{what} {min(names)!r} is read by the family {owner!r} already; leave it out of {family.name!r}"
            )
    FAMILIES[family.name] = family


def family_of(model_type: object) -> Family:
    """The family that reads a `config.json` of this `model_type`.

    Raises:
        CheckpointError: no family does.
    """
    known = _by_type()
    if isinstance(model_type, str) and model_type in known:
        return known[model_type]
    raise CheckpointError(
        f"model_type {model_type!r} is not known{suggest(str(model_type), known)}; "
        f"known are {', '.join(sorted(known))} (code that comes with a checkpoint is never run)"
    )


def family_named(name: str) -> Family:
    """The family of a `ModelConfig.family`.

    Raises:
        CheckpointError: none has this name.
    """
    if name not in FAMILIES:
        raise CheckpointError(
            f"family {name!r} is not known{suggest(name, FAMILIES)}; known are {', '.join(FAMILIES)} "
            "(register_family adds one)"
        )
    return FAMILIES[name]


def layout_of(architecture: object) -> GGUFLayout:
    """How to read a GGUF file of this `general.architecture`.

    Raises:
        CheckpointError: no family reads it.
    """
    known = _by_architecture()
    family = known.get(architecture) if isinstance(architecture, str) else None
    if family is None or family.gguf is None:
        raise CheckpointError(
            f"GGUF architecture {architecture!r} is not known{suggest(str(architecture), known)}; "
            f"known are {', '.join(sorted(known))}"
        )
    return family.gguf


def _by_type() -> dict[str, Family]:
    return {kind: family for family in FAMILIES.values() for kind in family.model_types}


def _by_architecture() -> dict[str, Family]:
    return {
        name: family
        for family in FAMILIES.values()
        if family.gguf is not None
        for name in family.gguf.architectures
    }


register_family(gpt2.FAMILY)
register_family(llama.FAMILY)
register_family(mistral.FAMILY)
register_family(mixtral.FAMILY)
register_family(qwen2.FAMILY)
register_family(qwen3.FAMILY)
register_family(qwen_moe.QWEN2_MOE)
register_family(qwen_moe.QWEN3_MOE)
register_family(glm4.GLM4)
register_family(glm4.GLM)
register_family(gemma.GEMMA)
register_family(gemma.GEMMA2)
register_family(easyllm.FAMILY)

__all__ = [
    "FAMILIES",
    "Family",
    "GGUFLayout",
    "GGUFMetadata",
    "family_named",
    "family_of",
    "layout_of",
    "register_family",
]
