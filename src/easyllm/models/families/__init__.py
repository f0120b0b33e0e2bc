"""Model families, one small module each.

A family module defines the reader and writer of the family's `config.json`, its tensor names in
Hugging Face and GGUF files, and its published sizes. To add a family, write its module and register
its `FAMILY` below; code outside this package calls `register_family`.
"""

from easyllm.core.errors import CheckpointError, ConfigError, suggest
from easyllm.models.families import (
    baichuan,
    chatglm,
    chatglm2,
    deepseek,
    easyllm,
    gemma,
    gemma3,
    glm,
    glm4,
    gpt2,
    internlm2,
    llama,
    mistral,
    mixtral,
    phi3,
    qwen2,
    qwen3,
    qwen_moe,
    t5,
    yi,
)
from easyllm.models.families.family import Family
from easyllm.models.families.gguf_layout import GGUFLayout, GGUFMetadata

FAMILIES: dict[str, Family] = {}
"""All registered families by name."""


def register_family(family: Family) -> None:
    """Registers a family, so that its models can be read, written and built.

    Raises:
        ConfigError: its name, `model_type` or GGUF architecture is already taken.
    """
    if family.name in FAMILIES:
        raise ConfigError(f"a family {family.name!r} is already registered; choose another name")
    taken = _by_type().keys() & set(family.model_types)
    architectures = family.gguf.architectures if family.gguf else ()
    taken_architectures = _by_architecture().keys() & set(architectures)
    for what, names in (("model_type", taken), ("GGUF architecture", taken_architectures)):
        if names:
            owner = (_by_type() | _by_architecture())[min(names)].name
            raise ConfigError(
                f"{what} {min(names)!r} is already read by the family {owner!r}; "
                f"leave it out of {family.name!r}"
            )
    FAMILIES[family.name] = family


def family_of(model_type: object) -> Family:
    """Returns the family that reads a `config.json` with this `model_type`.

    Raises:
        CheckpointError: there is no such family.
    """
    known = _by_type()
    if isinstance(model_type, str) and model_type in known:
        return known[model_type]
    raise CheckpointError(
        f"model_type {model_type!r} is not known{suggest(str(model_type), known)}; "
        f"known types are {', '.join(sorted(known))} "
        "(code shipped with a checkpoint is never executed)"
    )


def family_named(name: str) -> Family:
    """Returns the family with the given name (`ModelConfig.family`).

    Raises:
        CheckpointError: no family has this name.
    """
    if name not in FAMILIES:
        raise CheckpointError(
            f"family {name!r} is not known{suggest(name, FAMILIES)}; known families are "
            f"{', '.join(FAMILIES)} (register_family adds one)"
        )
    return FAMILIES[name]


def layout_of(architecture: object) -> GGUFLayout:
    """Returns the layout of GGUF files with this `general.architecture`.

    Raises:
        CheckpointError: no family reads it.
    """
    known = _by_architecture()
    family = known.get(architecture) if isinstance(architecture, str) else None
    if family is None or family.gguf is None:
        raise CheckpointError(
            f"GGUF architecture {architecture!r} is not known{suggest(str(architecture), known)}; "
            f"known architectures are {', '.join(sorted(known))}"
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
register_family(deepseek.V2)
register_family(deepseek.V3_FAMILY)
register_family(glm4.GLM4)
register_family(glm4.GLM)
register_family(gemma.GEMMA)
register_family(gemma.GEMMA2)
register_family(gemma3.FAMILY)
register_family(phi3.FAMILY)
register_family(internlm2.FAMILY)
register_family(yi.FAMILY)
register_family(baichuan.FAMILY)
register_family(chatglm.FAMILY)
register_family(chatglm2.FAMILY)
register_family(glm.FAMILY)
register_family(t5.FAMILY)
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
