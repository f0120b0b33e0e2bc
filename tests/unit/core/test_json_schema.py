"""JSON Schemas of recipes and requests: they accept what the loaders accept, and find typos."""

import inspect
import json
from pathlib import Path

import pytest

from easyllm.cli.schema import SCHEMAS, schema_of
from easyllm.core.json_schema import DRAFT
from easyllm.core.recipe_kind import command_of
from easyllm.core.yaml_text import read_yaml
from easyllm.engine import LLM, EngineConfig
from easyllm.engine.options import LLMOptions

RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))
RECIPE_KINDS = ("train", "run", "data-build")
TRAIN = {"data": {"train": ["rows.jsonl"]}}


def mistakes(name, values):
    """Returns the messages of all mistakes that the schema finds in a JSON-like value."""
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(schema_of(name))
    return [error.message for error in validator.iter_errors(values)]


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_are_valid(name):
    jsonschema = pytest.importorskip("jsonschema")
    schema = schema_of(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == DRAFT
    assert json.loads(json.dumps(schema)) == schema


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_match_their_schema_and_a_typo_does_not(path):
    values = read_yaml(path)
    name = command_of(values).replace(" ", "-")
    assert set(values) <= set(schema_of(name)["properties"])
    assert mistakes(name, values) == []
    assert mistakes(name, values | {"out_put": "runs/x"})


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": {"learning_rte": 1e-3}},
        {"optimizer": {"kind": "adam"}},
        {"optimizer": {"kind": "sgd", "betas": [0.9, 0.95]}},
        {"adapter": {"kind": "lora", "rnk": 4}},
        {"epochs": "three"},
        {"batch_size": 0},
        {"objective": {"kind": "nothing"}},
    ],
)
def test_nested_mistakes_are_found(change):
    assert mistakes("train", TRAIN) == []
    assert mistakes("train", TRAIN | change)


def test_only_the_default_variant_may_omit_its_kind():
    assert mistakes("train", TRAIN | {"optimizer": {"learning_rate": 1e-3}}) == []
    assert mistakes("train", TRAIN | {"optimizer": {"kind": "sgd", "momentum": 0.9}}) == []
    assert mistakes("train", TRAIN | {"optimizer": {"momentum": 0.9}})


def test_forms_that_the_loaders_convert_are_accepted():
    corpus = {"name": "a", "output": "b", "sources": {"web": {"paths": "web/*.txt"}}}
    assert mistakes("data-build", corpus) == []
    assert mistakes("data-build", corpus | {"dedup": "fineweb"}) == []
    assert mistakes("data-build", corpus | {"dedup": "finewb"})


def test_values_of_a_pipeline_may_be_references():
    stage = {"kind": "train", "data": "${stages.a.data}", "epochs": "${shared.epochs}"}
    recipe = {"name": "a", "output": "b", "stages": {"tune": stage}}
    assert mistakes("run", recipe) == []
    assert mistakes("run", recipe | {"stages": {"tune": stage | {"epochs": "$epochs"}}})
    assert mistakes("train", TRAIN | {"epochs": "${shared.epochs}"})


@pytest.mark.parametrize("name", ["sampling", "engine", "data-build", "chat-request"])
def test_every_field_has_a_description(name):
    schema = schema_of(name)
    models = {name: schema, **schema.get("$defs", {})}
    bare = [
        f"{model}.{field}"
        for model, inner in models.items()
        for field, values in inner["properties"].items()
        if "description" not in values and field != "kind"
    ]
    assert not bare


def test_engine_options_are_the_arguments_of_llm():
    arguments = inspect.signature(LLM.__init__).parameters
    own = LLMOptions.model_fields.keys() - EngineConfig.model_fields.keys()
    for name in own - {"weight_cache"}:  # taken by `options`, as the engine's are
        assert arguments[name].default == LLMOptions.model_fields[name].default
