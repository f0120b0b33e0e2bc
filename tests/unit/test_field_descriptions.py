"""Every field of a configuration describes itself; JSON Schema, flags and docs read that text."""

import inspect
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from easyllm.core.kinds import Kinds
from easyllm.core.manifest import Manifest
from easyllm.corpus.config import CorpusConfig
from easyllm.engine import EngineConfig, SamplingParams
from easyllm.engine.params import BeamParams
from easyllm.models.context import ContextConfig
from easyllm.nn.config import ModelConfig
from easyllm.pipeline.recipe import Recipe
from easyllm.quant.spec import QuantSpec
from easyllm.train.config import TrainConfig

ROOTS = (
    *(TrainConfig, Recipe, CorpusConfig, SamplingParams, EngineConfig, BeamParams),
    *(ModelConfig, ContextConfig, QuantSpec, Manifest),
)
DESCRIBED = (
    "adapters",
    "core",
    "corpus",
    "engine",
    "models",
    "nn",
    "pipeline",
    "quant",
    "tokenizer",
)
DESCRIBED += ("train", "rl")
"""The packages whose fields are described."""
LONGEST = 300


def models_in(annotation: Any, metadata: Iterable[Any] = ()) -> Iterator[type[BaseModel]]:
    """The models that a type annotation contains; for registered kinds, all variants."""
    registered = [kinds for kinds in metadata if isinstance(kinds, Kinds)]
    if registered:
        yield from (variant for kinds in registered for variant in kinds.variants)
    elif typing.get_origin(annotation) is typing.Annotated:
        yield from models_in(annotation.__origin__, annotation.__metadata__)
    elif isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
    else:
        for part in typing.get_args(annotation):
            yield from models_in(part)


def reachable(roots: Iterable[type[BaseModel]]) -> list[type[BaseModel]]:
    """All models that the fields of some models contain, at any depth."""
    found: dict[type[BaseModel], None] = {}
    waiting = list(roots)
    while waiting:
        model = waiting.pop()
        if model in found:
            continue
        found[model] = None
        for field in model.model_fields.values():
            waiting += models_in(field.annotation, field.metadata)
    return list(found)


def owner(model: type[BaseModel], name: str) -> type[BaseModel]:
    """The class that defines a field: the nearest one that annotates it."""
    return next(base for base in model.__mro__ if name in inspect.get_annotations(base))


def package(model: type[BaseModel]) -> str:
    """The package of a class of the project."""
    return model.__module__.split(".")[1]


def description(model: type[BaseModel], name: str, field: FieldInfo) -> str | None:
    """What describes a field; a variant's `kind` is described by the class docstring."""
    if name == "kind" and typing.get_origin(field.annotation) is typing.Literal:
        return " ".join((model.__doc__ or "").split("\n\n")[0].split())
    return field.description


MODELS = sorted(reachable(ROOTS), key=lambda model: model.__qualname__)
FIELDS = [
    pytest.param(model, name, id=f"{model.__qualname__}.{name}")
    for model in MODELS
    for name in model.model_fields
    if package(owner(model, name)) in DESCRIBED
]


@pytest.mark.parametrize(("model", "name"), FIELDS)
def test_every_field_has_a_short_description(model, name):
    text = description(model, name, model.model_fields[name])
    assert text, f"{model.__name__}.{name} has no Field(description=...)"
    assert len(text) <= LONGEST
    assert "\n" not in text
    assert text == text.strip()


@pytest.mark.parametrize("model", [m for m in MODELS if package(m) in DESCRIBED])
def test_a_docstring_does_not_repeat_the_fields(model):
    assert model.__doc__, f"{model.__name__} has no docstring"
    assert "Attributes:" not in model.__doc__


def test_the_walk_reaches_unions_registries_lists_and_dicts():
    names = {model.__name__ for model in MODELS}
    assert {"LoRAConfig", "ClassifierConfig", "CorpusDataConfig"} <= names  # registries
    assert {"MuonConfig", "InverseSqrtConfig", "UnigramConfig"} <= names  # unions
    assert {"ParameterGroup", "LayerConfig", "YarnScaling"} <= names  # tuples
    assert {"MergeStage", "CorpusSource", "GopherQuality"} <= names  # dicts


@pytest.mark.parametrize("mode", ["validation", "serialization"])
@pytest.mark.parametrize("root", ROOTS)
def test_the_json_schema_has_the_description_of_every_field(root, mode):
    schema = root.model_json_schema(mode=mode)
    shown = {**schema.get("$defs", {}), root.__name__: schema}
    for model in reachable([root]):
        for name, field in model.model_fields.items():
            described = shown[model.__name__]["properties"][name].get("description")
            assert described == field.description, f"{model.__name__}.{name}"
