"""Configuration fields with a registry of variants: `kind: lora`, `kind: classifier` ...

    ADAPTERS = Kinds("adapter", default="lora")
    class TrainConfig(Config):
        adapter: Annotated[AdapterConfig, ADAPTERS] | None = None
    ADAPTERS.register(LoRAConfig)          # now a recipe may say `adapter: {kind: lora, rank: 8}`

Variants that are registered later, by a user's module or a test, are validated, listed in error
messages, included in the JSON Schema and read from a run's `recipe.yaml` like the built-in ones.
"""

from collections.abc import Mapping

from pydantic import BaseModel, Discriminator, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError, core_schema


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

    def of(self, value: object) -> list[type[BaseModel]]:
        """Returns the configuration class for the kind of a value.

        A value without `kind` has the default kind; an unknown kind returns all classes.
        """
        kind = value.get("kind") if isinstance(value, Mapping) else None
        found = self._variants.get(self.default if kind is None else str(kind))
        return self.variants if found is None else [found]

    def validate(self, value: object) -> BaseModel:
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
        self, _source: object, _handler: GetCoreSchemaHandler
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
        variants = {kind: each.__pydantic_core_schema__ for kind, each in self._variants.items()}
        return union_json_schema(variants, self.default, handler)


class _KindOr(Discriminator):
    """A discriminator by `kind`, made by `kind_or`, whose JSON Schema shows the kinds."""

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        assert callable(self.discriminator)
        assert schema["type"] == "tagged-union"
        variants = {str(kind): variant for kind, variant in schema["choices"].items()}
        return union_json_schema(variants, str(self.discriminator(None)), handler)


def kind_or(default: str) -> Discriminator:
    """Returns a discriminator that selects a variant of a union by `kind`, by default `default`.

    Example: Annotated[Annotated[A, Tag("a")] | Annotated[B, Tag("b")], kind_or("a")]
    """

    def kind(value: object) -> str:
        found = value.get("kind", default) if isinstance(value, Mapping) else None
        return str(getattr(value, "kind", default) if found is None else found)

    return _KindOr(kind)


def union_json_schema(
    variants: Mapping[str, CoreSchema], default: str, handler: GetJsonSchemaHandler
) -> JsonSchemaValue:
    """Returns the JSON Schema of a union that is discriminated by `kind`.

    Each variant is a reference into `$defs`. All variants but the default one require `kind`, so
    that a value without `kind` matches exactly one of them.

    Args:
        variants: core schemas of the variants, by their `kind`.
        default: the kind of a value without `kind`.
        handler: pydantic's generator of JSON Schema.
    """
    schema = handler(core_schema.tagged_union_schema({**variants}, discriminator="kind"))
    usual = schema["discriminator"]["mapping"].get(default)
    schema["oneOf"] = [
        one if one.get("$ref", one) == usual else one | {"required": ["kind"]}
        for one in schema["oneOf"]
    ]
    return schema


__all__ = ["Kinds", "kind_or", "union_json_schema"]
