"""The registered methods of parameter-efficient fine-tuning, by kind and by `peft_type`."""

from collections.abc import Callable
from dataclasses import dataclass

from easyllm.adapters.adapter import AdapterConfig
from easyllm.adapters.adapter_set import AdapterSet
from easyllm.core.errors import CheckpointError
from easyllm.core.json_types import JsonMapping
from easyllm.core.kinds import Kinds


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterKind:
    """A registered method.

    Attributes:
        config: the configuration class.
        peft_type: the `peft_type` in `adapter_config.json`.
        adapter_set: the class that manages the modules together and their shared state.
        reads: for a method that shares its `peft_type` with others: returns whether a parsed
            `adapter_config.json` describes it. None reads all files that no other method claims.
    """

    config: type[AdapterConfig]
    peft_type: str
    adapter_set: type[AdapterSet]
    reads: Callable[[JsonMapping], bool] | None = None


ADAPTERS = Kinds("adapter", default="lora")
"""The kinds that a recipe may set under `adapter:`."""
_KINDS: dict[str, AdapterKind] = {}


def register_adapter(
    config: type[AdapterConfig],
    *,
    peft_type: str,
    adapter_set: type[AdapterSet] | None = None,
    reads: Callable[[JsonMapping], bool] | None = None,
) -> None:
    """Registers a method for recipes, training, adapter files, plans and the engine.

    Args:
        config: the configuration class; its `kind` default is the name in recipes.
        peft_type: the `peft_type` written to files; peft's own name if peft has the method.
        adapter_set: an `AdapterSet` subclass, for a method with state beyond its modules.
        reads: for a method that shares `peft_type` with others, see `AdapterKind.reads`.

    Raises:
        ValueError: the kind is already registered, or `peft_type` is and no `reads` is given.
    """
    if reads is None and any(k.peft_type == peft_type and not k.reads for k in _KINDS.values()):
        raise ValueError(f"an adapter with peft_type {peft_type!r} is already registered")
    ADAPTERS.register(config)
    name = config.model_fields["kind"].default
    _KINDS[name] = AdapterKind(
        config=config,
        peft_type=peft_type,
        adapter_set=adapter_set or AdapterSet,
        reads=reads,
    )


def unregister_adapter(kind: str) -> None:
    """Unregisters a method; used by tests that register their own."""
    ADAPTERS.unregister(kind)
    del _KINDS[kind]


def kind_of(config: AdapterConfig) -> AdapterKind:
    """Returns the registered method of a configuration."""
    return _KINDS[config.kind]


def kind_of_file(description: JsonMapping) -> AdapterKind:
    """Returns the registered method of a parsed `adapter_config.json`.

    Raises:
        CheckpointError: no method with its `peft_type` is registered.
    """
    peft_type = description.get("peft_type")
    kinds = [kind for kind in _KINDS.values() if kind.peft_type == peft_type]
    for kind in sorted(kinds, key=lambda kind: kind.reads is None):
        if kind.reads is None or kind.reads(description):
            return kind
    known = ", ".join(dict.fromkeys(kind.peft_type for kind in _KINDS.values()))
    raise CheckpointError(
        f"the adapter has peft_type {peft_type!r}, which no registered method reads (known: "
        f"{known}); import the module that registers it first"
    )


__all__ = [
    "ADAPTERS",
    "AdapterKind",
    "kind_of",
    "kind_of_file",
    "register_adapter",
    "unregister_adapter",
]
