"""The registered methods of parameter-efficient fine-tuning, by kind and by `peft_type`."""

from dataclasses import dataclass

from easyllm.adapters.adapter import AdapterConfig
from easyllm.adapters.adapter_set import AdapterSet
from easyllm.core.errors import CheckpointError
from easyllm.core.kinds import Kinds


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterKind:
    """A registered method.

    Attributes:
        config: the configuration class.
        peft_type: the `peft_type` in `adapter_config.json`.
        adapter_set: the class that manages the modules together and their shared state.
    """

    config: type[AdapterConfig]
    peft_type: str
    adapter_set: type[AdapterSet]


ADAPTERS = Kinds("adapter", default="lora")
"""The kinds that a recipe may set under `adapter:`."""
_KINDS: dict[str, AdapterKind] = {}


def register_adapter(
    config: type[AdapterConfig],
    *,
    peft_type: str,
    adapter_set: type[AdapterSet] | None = None,
) -> None:
    """Registers a method for recipes, training, adapter files, plans and the engine.

    Args:
        config: the configuration class; its `kind` default is the name in recipes.
        peft_type: the `peft_type` written to files; peft's own name if peft has the method.
        adapter_set: an `AdapterSet` subclass, for a method with state beyond its modules.

    Raises:
        ValueError: the kind or `peft_type` is already registered.
    """
    if any(kind.peft_type == peft_type for kind in _KINDS.values()):
        raise ValueError(f"an adapter with peft_type {peft_type!r} is already registered")
    ADAPTERS.register(config)
    name = config.model_fields["kind"].default
    _KINDS[name] = AdapterKind(
        config=config, peft_type=peft_type, adapter_set=adapter_set or AdapterSet
    )


def unregister_adapter(kind: str) -> None:
    """Unregisters a method; used by tests that register their own."""
    ADAPTERS.unregister(kind)
    del _KINDS[kind]


def kind_of(config: AdapterConfig) -> AdapterKind:
    """Returns the registered method of a configuration."""
    return _KINDS[config.kind]


def kind_of_file(peft_type: object) -> AdapterKind:
    """Returns the registered method with this `peft_type`.

    Raises:
        CheckpointError: no method with this `peft_type` is registered.
    """
    for kind in _KINDS.values():
        if kind.peft_type == peft_type:
            return kind
    known = ", ".join(kind.peft_type for kind in _KINDS.values())
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
