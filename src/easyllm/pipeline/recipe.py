"""Recipes: YAML files of named stages.

@name             the result of the stage `name`; @name/part is a file or folder in it
${stages.a.data}  the value at this key of the recipe, with overrides applied
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from easyllm.core.config import Config, validate
from easyllm.core.errors import ConfigError, SourceError, suggest
from easyllm.core.json_types import Json, JsonMapping, JsonObject
from easyllm.core.paths import PathText, expanded
from easyllm.core.recipe_kind import read_recipe
from easyllm.core.run_folder import recipes_folder
from easyllm.corpus.config import CorpusParts, CorpusSource, resolve_sources
from easyllm.rl.register import POLICY_OBJECTIVES
from easyllm.tokenizer.extend import Script
from easyllm.tokenizer.train_config import TokenizerConfig
from easyllm.train.config import TrainConfig

STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
MOVED_ASIDE = re.compile(r".*\.[0-9]+")
"""Names of the folders of earlier trainings (`tune.1`), which are not names of stages."""
RESERVED_NAMES = ("stages", "recipe.yaml", "summary.json", "pending")
"""What a run's folder and its `stages` folder contain in addition to stages."""
REFERENCE = re.compile(r"@([\w.-]+)(?:/(.+))?")
VALUE_OF = re.compile(r"\$\{([\w.-]+)\}")
DATA_PATHS = ("train", "eval", "shards", "validation")
OBJECTIVE_PATHS = (("warm_start", "replay"), ("pretraining", "files"))
SEEDED = ("train", "corpus")
OBJECTIVES_FROM = (POLICY_OBJECTIVES,)
"""Objectives of other packages than `train`, which are registered by being imported here."""


class TokenizerStage(TokenizerConfig):
    """Trains a tokenizer on the texts of data sources."""

    kind: Literal["tokenizer"]
    sources: dict[str, CorpusSource] = Field(
        min_length=1, description="Sources of the training texts, by name."
    )


class ExtendStage(Config):
    """Extends a model's tokenizer and embeddings with tokens learned from data sources."""

    kind: Literal["extend"]
    model: str = Field(description="Source of the model to extend.")
    sources: dict[str, CorpusSource] = Field(
        min_length=1, description="Sources of the texts to learn from, by name."
    )
    new: PositiveInt = Field(default=8000, description="Number of tokens to add.")
    script: Script = Field(
        default="non_ascii",
        description="Learn from all text outside ASCII (`non_ascii`), or from Han characters only "
        "(`han`).",
    )
    dtype: str | None = Field(
        default=None, description="Dtype of the saved weights; null keeps the model's."
    )


class CorpusStage(CorpusParts):
    """Builds token shards from data sources."""

    kind: Literal["corpus"]


class ConvertStage(Config):
    """Converts a model to a Hugging Face folder."""

    kind: Literal["convert"]
    model: str = Field(description="Source of the model.")
    dtype: str | None = Field(
        default=None, description="Dtype of the saved weights; null keeps the model's."
    )
    num_kv_heads: PositiveInt | None = Field(
        default=None,
        description="Number of KV heads after merging them by mean pooling; null keeps them.",
    )


class EvaluateStage(Config):
    """Computes the loss on each data file, and recall if its rows have keys."""

    kind: Literal["evaluate"]
    model: str = Field(description="Source of the model.")
    data: dict[str, PathText] = Field(min_length=1, description="Data files, by name.")
    max_tokens: PositiveInt = Field(
        default=32, description="Maximum length of a generated answer, in tokens."
    )


class TrainStage(TrainConfig):
    """A training run."""

    kind: Literal["train"]


class MergeStage(Config):
    """Merges an adapter into its base model and saves the merged model."""

    kind: Literal["merge"]
    model: str = Field(description="Source of the base model.")
    adapter: PathText = Field(description="Folder of the adapter.")
    check: bool = Field(
        default=True,
        description="Whether the merged model is compared with the adapter before it is kept.",
    )
    virtual_tokens: Literal["refuse", "keep"] = Field(
        default="refuse",
        description="What to do with an adapter of virtual tokens (prompt, ptuning, prefix), which "
        "cannot be merged: `refuse` it, or `keep` it as it is, attached to its base.",
    )


Stage = Annotated[
    TokenizerStage
    | ExtendStage
    | CorpusStage
    | ConvertStage
    | EvaluateStage
    | TrainStage
    | MergeStage,
    Field(discriminator="kind"),
]


class Recipe(Config):
    """A pipeline of stages."""

    name: str = Field(description="Name of the recipe.")
    output: PathText = Field(description="Folder for the results of all stages.")
    seed: NonNegativeInt = Field(
        default=0,
        description="Seed of every stage that uses random numbers and sets no seed itself.",
    )
    stages: dict[str, Stage] = Field(
        min_length=1, description="The stages by name, in the order in which they run."
    )

    @model_validator(mode="before")
    @classmethod
    def _seeded(cls, values: Json) -> Json:
        """Applies the recipe's seed to stages that set none."""
        stages = values.get("stages") if isinstance(values, Mapping) else None
        if not isinstance(stages, Mapping):
            return values
        seed = values.get("seed", 0)
        seeded = {
            name: {"seed": seed, **stage}
            if isinstance(stage, Mapping) and stage.get("kind") in SEEDED
            else stage
            for name, stage in stages.items()
        }
        return {**values, "stages": seeded}

    @model_validator(mode="after")
    def _names_are_folders(self) -> "Recipe":
        seen: dict[str, str] = {}
        for name in self.stages:
            check_stage_name(name)
            other = seen.setdefault(name.lower(), name)
            if other != name:
                raise ValueError(
                    f"stages {other!r} and {name!r} differ only in case, so that some file systems "
                    "would give them one folder; rename one of them"
                )
        return self

    @model_validator(mode="after")
    def _references_point_back(self) -> "Recipe":
        seen: list[str] = []
        for name, stage in self.stages.items():
            for reference in references(stage):
                if reference not in seen:
                    raise ValueError(
                        f"stage {name!r} uses @{reference}, which is not an earlier stage"
                        f"{suggest(reference, seen)}"
                    )
            seen.append(name)
        return self


def check_stage_name(name: str) -> None:
    """Checks that a stage's name is the name of a folder of its own inside the run's folder.

    Raises:
        ValueError: it is not.
    """
    if STAGE_NAME.fullmatch(name) is None:
        raise ValueError(
            f"stage name {name!r} is not a plain name; use up to 100 letters, digits, '-', '_' and "
            "'.', the first a letter or digit"
        )
    if name.lower() in RESERVED_NAMES:
        raise ValueError(
            f"stage name {name!r} is that of a file or folder of every run (reserved names: "
            f"{', '.join(RESERVED_NAMES)}); choose another name"
        )
    if MOVED_ASIDE.fullmatch(name):
        raise ValueError(
            f"stage name {name!r} ends in a dot and a number, as the folders of earlier trainings "
            "do; choose another name"
        )


def references(stage: Config) -> list[str]:
    """Returns the names of the stages whose results a stage uses, without duplicates."""
    found = (REFERENCE.fullmatch(text) for text in _texts(stage.model_dump()))
    return list(dict.fromkeys(match[1] for match in found if match))


def is_reference(value: str) -> bool:
    """Returns whether a value refers to the result of a stage."""
    return REFERENCE.fullmatch(value) is not None


def resolve(stage: Config, products: Mapping[str, Path]) -> Config:
    """Returns the stage with every `@name` replaced by the path of that stage's result."""

    def path_of(match: re.Match[str]) -> str:
        product = products[match[1]]
        return str(product / match[2] if match[2] else product)

    return type(stage).model_validate(_replaced(stage.model_dump(), REFERENCE, path_of))


def find_recipe(name: str) -> Path:
    """Returns the file of a recipe, given its path or the name of a built-in recipe.

    Raises:
        SourceError: there is no such recipe.
    """
    path = expanded(name)
    if path.is_file():
        return path
    shipped = {p.stem: p for p in sorted(recipes_folder().glob("*.yaml"))}
    if path.stem in shipped and (path.name == path.stem or path.parent.name == "recipes"):
        return shipped[path.stem]
    state = "is a folder" if path.is_dir() else "does not exist"
    raise SourceError(
        f"recipe {name!r} {state}{suggest(name, shipped)}; give a YAML file or one of "
        f"{', '.join(shipped)}"
    )


def shipped_name(path: Path) -> str | None:
    """Returns the name of a shipped recipe's file; None for another file."""
    return path.stem if path.parent == recipes_folder() else None


def load_recipe(path: Path, overrides: list[str]) -> Recipe:
    """Loads a pipeline recipe, with data paths resolved and the seed applied to its stages.

    Args:
        path: the recipe's file.
        overrides: changes to the recipe, as `key=value`.

    Raises:
        ConfigError: the recipe is invalid; the message lists all errors.
    """
    values = read_recipe(path, Recipe, "run", overrides)
    values = _filled(values, values, ())
    stages = values.get("stages")
    if isinstance(stages, dict):
        for stage in stages.values():
            if isinstance(stage, dict):
                resolve_paths(stage, path.parent)
    return validate(Recipe, values, source=str(path), overrides=overrides)


def load_train_recipe(path: Path, overrides: list[str]) -> TrainConfig:
    """Loads a training recipe, with data paths resolved.

    Args:
        path: the recipe's file.
        overrides: changes to the recipe, as `key=value`.

    Raises:
        ConfigError: the recipe is invalid; the message lists all errors.
    """
    values = read_recipe(path, TrainConfig, "train", overrides)
    resolve_paths(values, path.parent)
    return validate(TrainConfig, values, source=str(path), overrides=overrides)


def resolve_paths(values: JsonObject, folder: Path) -> None:
    """Makes the data paths of a stage absolute, in place.

    A path is relative to the recipe's folder if it exists there, else to the working directory.
    """

    def place(path: object) -> Json:
        if isinstance(path, list | tuple):
            return [place(part) for part in path]
        if not isinstance(path, str) or is_reference(path):
            return path
        in_folder = folder / expanded(path)
        return str((in_folder if in_folder.exists() else expanded(path)).resolve())

    resolve_sources(values, folder)
    if "retention" in values:
        values["retention"] = place(values["retention"])
    model = values.get("model")
    if isinstance(model, dict) and "tokenizer" in model:
        # a fresh model may have a tokenizer that the recipe brings along
        brought = folder / expanded(str(model["tokenizer"]))
        if brought.is_dir():
            values["model"] = model | {"tokenizer": str(brought.resolve())}
    objective = values.get("objective")
    if isinstance(objective, dict):
        found = dict[str, Json](objective)
        for part, key in OBJECTIVE_PATHS:
            options = objective.get(part)
            if isinstance(options, dict) and key in options:
                found[part] = options | {key: place(options[key])}
        values["objective"] = found
    data = values.get("data")
    if not isinstance(data, dict):
        return
    if values.get("kind") == "evaluate":
        values["data"] = {name: place(path) for name, path in data.items()}
        return
    data = {key: place(value) if key in DATA_PATHS else value for key, value in data.items()}
    values["data"] = data


def _texts(value: object) -> Iterator[str]:
    """Yields every string in nested mappings and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def _replaced(
    value: Json, pattern: re.Pattern[str], replace: Callable[[re.Match[str]], Json]
) -> Json:
    """Returns a copy in which every string that matches is replaced by `replace(match)`."""
    if isinstance(value, str):
        match = pattern.fullmatch(value)
        return replace(match) if match else value
    if isinstance(value, Mapping):
        return {key: _replaced(inner, pattern, replace) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(inner, pattern, replace) for inner in value]
    return value


def _filled(value: object, recipe: JsonMapping, within: tuple[str, ...]) -> Json:
    """Returns a copy in which every `${key.sub}` is replaced by the recipe's value at that key.

    Raises:
        ConfigError: the key does not exist, or the references are circular.
    """

    def value_at(match: re.Match[str]) -> Json:
        place, here = match[1], recipe
        if place in within:
            raise ConfigError(f"${{{place}}} refers to itself; write the value in one place")
        for key in place.split("."):
            if not isinstance(here, Mapping) or key not in here:
                known = list(here) if isinstance(here, Mapping) else []
                raise ConfigError(
                    f"${{{place}}}: the recipe has no {key!r} there{suggest(key, known)}"
                )
            here = here[key]
        return _filled(here, recipe, (*within, place))

    return _replaced(value, VALUE_OF, value_at)
