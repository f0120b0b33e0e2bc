"""JSON Schema (draft 2020-12) of configuration types, for editors and the generated docs.

It differs from pydantic's in three ways. Generated titles, which repeat the names, are omitted.
Every model is a definition. Values may be references, such as `${seed}` in a pipeline recipe.
"""

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from easyllm.core.json_types import Json, JsonObject, TypeForm

DRAFT = "https://json-schema.org/draft/2020-12/schema"
_ATTRIBUTES = "\n\nAttributes:"


def json_schema(annotation: TypeForm, *, reference: str | None = None) -> JsonObject:
    """Returns the JSON Schema of a configuration type.

    Args:
        annotation: the type, such as a model.
        reference: a regular expression; strings that match it are allowed in place of any value.
    """
    schema = TypeAdapter(annotation).json_schema(schema_generator=_Generator)
    defs = schema.pop("$defs", {})
    for model in (schema, *list(defs.values())):
        for key, inner in model.items():
            model[key] = _hoisted(inner, defs)
    for model in (schema, *defs.values()):
        if "description" in model:  # a docstring, whose list of attributes repeats the fields
            model["description"] = model["description"].partition(_ATTRIBUTES)[0]
        if reference is not None:
            _allow(model, {"type": "string", "pattern": reference})
    return {"$schema": DRAFT, **schema} | ({"$defs": dict(sorted(defs.items()))} if defs else {})


class _Generator(GenerateJsonSchema):
    """Generates the schema without titles."""

    def field_title_should_be_set(self, schema: object) -> bool:  # noqa: ARG002
        """Returns whether a field gets a title: never."""
        return False


def _hoisted(value: object, defs: JsonObject) -> Json:
    """Returns a value in which models are references to `defs`; adds them there.

    Pydantic repeats the variants of registered kinds wherever such a field occurs.
    """
    if isinstance(value, list):
        return [_hoisted(inner, defs) for inner in value]
    if not isinstance(value, dict):
        return value
    value = {key: _hoisted(inner, defs) for key, inner in value.items()}
    name = value.get("title")
    if not isinstance(name, str) or "properties" not in value:
        return value
    assert defs.setdefault(name, value) == value, f"two models are named {name}"
    return {"$ref": f"#/$defs/{name}"}


def _allow(schema: JsonObject, reference: JsonObject) -> None:
    """Allows a reference in place of every value inside of `schema`, in place."""
    for key in ("properties", "patternProperties"):
        for name, inner in schema.get(key, {}).items():
            schema[key][name] = _or_reference(inner, reference)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            schema[key] = _or_reference(schema[key], reference)
    if "prefixItems" in schema:
        schema["prefixItems"] = [_or_reference(each, reference) for each in schema["prefixItems"]]
    for key in ("anyOf", "oneOf", "allOf"):
        for inner in schema.get(key, ()):
            _allow(inner, reference)


def _or_reference(schema: JsonObject, reference: JsonObject) -> JsonObject:
    """Returns a schema that also accepts a reference; a constant `kind` must be written out."""
    if "const" in schema or not schema:
        return schema
    _allow(schema, reference)
    outer = {key: schema.pop(key) for key in ("description", "default") if key in schema}
    if set(schema) == {"anyOf"}:
        return {"anyOf": [*schema["anyOf"], reference]} | outer
    return {"anyOf": [schema, reference]} | outer


__all__ = ["DRAFT", "json_schema"]
