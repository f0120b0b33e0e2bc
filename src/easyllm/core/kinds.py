"""Configuration fields with a registry of variants: `kind: lora`, `kind: classifier` ...

    ADAPTERS = Kinds("adapter", default="lora")
    class TrainConfig(Config):
        adapter: Annotated[AdapterConfig, ADAPTERS] | None = None
    ADAPTERS.register(LoRAConfig)          # now a recipe may say `adapter: {kind: lora, rank: 8}`

Variants that are registered later, by a user's module or a test, are validated, listed in error
messages, included in the JSON Schema and read from a run's `recipe.yaml` like the built-in ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError, core_schema


@dataclass(frozen=True, slots=True)
class KindOr:
    """Returns the `kind` of a value, or a default if it has none.

    Attributes:
        default: the kind of a value without `kind`.
    """

    default: str

    @property
    def __name__(self) -> str:
        """The name that pydantic shows for a discriminator."""
        return "kind"

    def __call__(self, value: Any) -> str:
        """Returns the kind of a mapping or of a configuration."""
        found = value.get("kind", self.default) if isinstance(value, Mapping) else None
        return str(getattr(value, "kind", self.default) if found is None else found)


def requiring_kind(schema: JsonSchemaValue) -> JsonSchemaValue:
    """Returns the JSON Schema of a variant that is selected only by naming its `kind`."""
    return {"allOf": [schema], "required": ["kind"]}


class Kinds:
    """A registry of the variants of a configuration field, by their `kind`.

    Args:
        what: what the variants are (such as "adapter"), for error messages.
        default: the kind of a value without `kind`.
    """

    def __init__(self, what: str, *, default: str) -> None:
        self.what, self.default = what, default
        self._variants: dict[str, type[BaseModel]] = {}

    def register(self, config: type[BaseModel]) -> None:
        """Adds a variant: a model with a field `kind` that has a default.

        Raises:
            ValueError: the model has no such field, or its kind is already registered.
        """
        field = config.model_fields.get("kind")
        kind = None if field is None else field.default
        if not isinstance(kind, str):
            raise ValueError(
                f"{config.__name__} needs a field like kind: Literal['name'] = 'name' "
                "to be registered"
            )
        if kind in self._variants:
            raise ValueError(f"a kind of {self.what} called {kind!r} is already registered")
        self._variants[kind] = config

    def unregister(self, kind: str) -> None:
        """Removes a variant, for tests that registered one."""
        del self._variants[kind]

    @property
    def names(self) -> list[str]:
        """The registered kinds."""
        return list(self._variants)

    @property
    def variants(self) -> list[type[BaseModel]]:
        """The registered configurations."""
        return list(self._variants.values())

    def of(self, value: Any) -> list[type[BaseModel]]:
        """Returns the configuration class for the kind of a value.

        A value without `kind` has the default kind; an unknown kind returns all classes.
        """
        kind = value.get("kind") if isinstance(value, Mapping) else None
        found = self._variants.get(self.default if kind is None else str(kind))
        return self.variants if found is None else [found]

    def validate(self, value: Any) -> BaseModel:
        """Returns the configuration that a mapping describes.

        A configuration of a registered kind is returned unchanged.

        Raises:
            PydanticCustomError: `value` is not a mapping.
            PydanticKnownError: the kind is not registered.
        """
        if isinstance(value, BaseModel):
            if type(value) in self._variants.values():
                return value
            value = value.model_dump()
        if not isinstance(value, Mapping):
            raise PydanticCustomError(
                "kind_type",
                "expected a mapping with kind: {known}",
                {"known": ", ".join(self._variants)},
            )
        kind = value.get("kind")
        kind = self.default if kind is None else str(kind)
        if kind not in self._variants:
            expected = ", ".join(repr(name) for name in self._variants)
            raise PydanticKnownError(
                "union_tag_invalid",
                {"discriminator": "'kind'", "tag": kind, "expected_tags": expected},
            )
        given = {key: inner for key, inner in value.items() if key != "kind"}
        return self._variants[kind].model_validate(given | {"kind": kind})

    def __get_pydantic_core_schema__(
        self, _source: Any, _handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.validate,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda value, info: value.model_dump(mode=info.mode), info_arg=True
            ),
        )

    def __get_pydantic_json_schema__(
        self, _schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schemas = {
            kind: handler(variant.__pydantic_core_schema__)
            for kind, variant in self._variants.items()
        }
        # the default first, the others by name: the order of registration is that of imports
        order = sorted(schemas, key=lambda kind: (kind != self.default, kind))
        return {
            "oneOf": [
                schemas[kind] if kind == self.default else requiring_kind(schemas[kind])
                for kind in order
            ]
        }


__all__ = ["KindOr", "Kinds", "requiring_kind"]
