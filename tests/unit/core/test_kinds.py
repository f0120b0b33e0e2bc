"""Registered kinds and unions with a default kind in JSON Schema."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import Tag

from easyllm.core.config import Config
from easyllm.core.json_schema import json_schema
from easyllm.core.kinds import Kinds, kind_or
from easyllm.core.run_folder import recipes_folder
from easyllm.core.yaml_text import read_yaml
from easyllm.pipeline.recipe import Recipe, load_recipe
from easyllm.train.config import TrainConfig

RECIPES = {path: read_yaml(path) for path in sorted(recipes_folder().glob("*.yaml"))}


class Inner(Config):
    width: int = 1


class First(Config):
    """The first kind."""

    kind: Literal["first"] = "first"
    size: int = 0
    left: Inner = Inner()
    right: Inner = Inner()


class Second(Config):
    """The second kind."""

    kind: Literal["second"] = "second"
    size: int


KINDS = Kinds("part", default="first")
KINDS.register(First)
KINDS.register(Second)
UNION = Annotated[
    Annotated[First, Tag("first")] | Annotated[Second, Tag("second")], kind_or("first")
]


class ByRegistry(Config):
    part: Annotated[Config, KINDS]
    parts: tuple[Annotated[Config, KINDS], ...] = ()
    maybe: Annotated[Config, KINDS] | None = None


class ByUnion(Config):
    part: UNION
    parts: tuple[UNION, ...] = ()
    maybe: UNION | None = None


def errors(model: Any, values: Any) -> list[str]:
    """The messages of a JSON Schema validator."""
    validator = pytest.importorskip("jsonschema").Draft202012Validator(json_schema(model))
    return [error.message for error in validator.iter_errors(values)]


@pytest.mark.parametrize("model", [ByRegistry, ByUnion])
def test_variants_are_definitions_that_the_discriminator_names(model):
    schema = model.model_json_schema()
    assert {"First", "Second", "Inner"} <= set(schema["$defs"])
    part = schema["properties"]["part"]
    assert part["discriminator"] == {
        "propertyName": "kind",
        "mapping": {"first": "#/$defs/First", "second": "#/$defs/Second"},
    }
    assert part["oneOf"] == [
        {"$ref": "#/$defs/First"},
        {"$ref": "#/$defs/Second", "required": ["kind"]},
    ]
    for name, kind in (("First", "first"), ("Second", "second")):
        assert schema["$defs"][name]["description"] == f"The {kind} kind."
        assert schema["$defs"][name]["properties"]["kind"]["const"] == kind


@pytest.mark.parametrize("model", [ByRegistry, ByUnion])
@pytest.mark.parametrize(
    ("part", "is_valid"),
    [
        ({}, True),
        ({"size": 1}, True),
        ({"kind": "second", "size": 1}, True),
        ({"kind": "second"}, False),
        ({"kind": "third"}, False),
        ({"kind": "second", "size": 1, "left": {}}, False),
    ],
)
def test_the_schema_accepts_what_the_model_accepts(model, part, is_valid):
    for values in ({"part": part}, {"part": {}, "parts": [part]}, {"part": {}, "maybe": part}):
        assert (errors(model, values) == []) is is_valid
        if is_valid:
            model.model_validate(values)
        else:
            with pytest.raises(ValueError, match="validation error"):
                model.model_validate(values)


def test_a_kind_registered_later_is_in_the_schema():
    class Third(Config):
        kind: Literal["third"] = "third"

    KINDS.register(Third)
    try:
        assert errors(ByRegistry, {"part": {"kind": "third"}}) == []
    finally:
        KINDS.unregister("third")
    assert errors(ByRegistry, {"part": {"kind": "third"}})


@pytest.mark.parametrize(
    "path", [path for path in RECIPES if "stages" in RECIPES[path]], ids=lambda path: path.stem
)
def test_the_schema_accepts_the_built_in_pipelines(path):
    assert errors(Recipe, load_recipe(path, []).model_dump(mode="json")) == []


@pytest.mark.parametrize(
    "path",
    [path for path, values in RECIPES.items() if not {"stages", "sources"} & set(values)],
    ids=lambda path: path.stem,
)
def test_the_schema_accepts_the_built_in_training_recipes(path):
    assert errors(TrainConfig, RECIPES[path]) == []
