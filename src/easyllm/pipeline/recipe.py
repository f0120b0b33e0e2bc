"""Recipes: a YAML file of named stages.

@name             what the stage `name` made; @name/part a file or folder in it
${stages.a.data}  the value that stands there in the recipe, overrides included
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from easyllm.core.config import Config, apply_overrides, environment_overrides, read_yaml, validate
from easyllm.core.errors import ConfigError, SourceError, suggest
from easyllm.core.recipe_kind import refuse_other_kinds
from easyllm.core.run_folder import recipes_folder
from easyllm.corpus.config import CorpusParts, CorpusSource, place_sources
from easyllm.tokenizer.train import TokenizerConfig
from easyllm.train.config import TrainConfig

REFERENCE = re.compile(r"@([\w-]+)(?:/(.+))?")
VALUE_OF = re.compile(r"\$\{([\w.-]+)\}")
DATA_PATHS = ("train", "eval", "shards", "validation")
SEEDED = ("train", "corpus")


class TokenizerStage(TokenizerConfig):
    """Trains a tokenizer on the texts of sources."""

    kind: Literal["tokenizer"]
    sources: dict[str, CorpusSource] = Field(min_length=1)


class CorpusStage(CorpusParts):
    """Builds token shards from sources."""

    kind: Literal["corpus"]


class ConvertStage(Config):
    """Rewrites a model as a Hugging Face folder."""

    kind: Literal["convert"]
    model: str
    dtype: str | None = None
    num_kv_heads: PositiveInt | None = None


class EvaluateStage(Config):
    """Loss on each data file, and recall where its rows have keys."""

    kind: Literal["evaluate"]
    model: str
    data: dict[str, str] = Field(min_length=1)
    max_tokens: PositiveInt = 32


class TrainStage(TrainConfig):
    """A training run."""

    kind: Literal["train"]


class MergeStage(Config):
    """Folds an adapter into its base model and saves the whole."""

    kind: Literal["merge"]
    model: str
    adapter: str


Stage = Annotated[
    TokenizerStage | CorpusStage | ConvertStage | EvaluateStage | TrainStage | MergeStage,
    Field(discriminator="kind"),
]


class Recipe(Config):
    """A pipeline. The seed is that of every stage that draws random numbers and names none of its own."""

    name: str
    output: str
    seed: NonNegativeInt = 0
    stages: dict[str, Stage] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _seeded(cls, values: Any) -> Any:
        """The recipe's seed is that of stages without one."""
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
    def _references_point_back(self) -> "Recipe":
        seen: list[str] = []
        for name, stage in self.stages.items():
            for reference in references(stage):
                if reference not in seen:
                    raise ValueError(
                        f"stage {name!r} uses @{reference}, which is no stage before it"
                        f"{suggest(reference, seen)}"
                    )
            seen.append(name)
        return self


def references(stage: Config) -> list[str]:
    """Names of the stages whose results a stage uses, each once."""
    found = (REFERENCE.fullmatch(text) for text in _texts(stage.model_dump()))
    return list(dict.fromkeys(match[1] for match in found if match))


def is_reference(value: str) -> bool:
    """Whether a value stands for what a stage made."""
    return REFERENCE.fullmatch(value) is not None


def resolve(stage: Config, products: Mapping[str, Path]) -> Config:
    """The stage with every `@name` replaced by the path of what that stage made."""

    def path_of(match: re.Match[str]) -> str:
        product = products[match[1]]
        return str(product / match[2] if match[2] else product)

    return type(stage).model_validate(_replaced(stage.model_dump(), REFERENCE, path_of))


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path or by the name of a shipped one.

    Raises:
        SourceError: there is none.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = {p.stem: p for p in sorted(recipes_folder().glob("*.yaml"))}
    if path.stem in shipped and (path.name == path.stem or path.parent.name == "recipes"):
        return shipped[path.stem]
    raise SourceError(
        f"recipe {name!r} does not exist{suggest(name, shipped)}; name a YAML file or one of {', '.join(shipped)}"
    )


def load_recipe(path: Path, overrides: list[str]) -> Recipe:
    """A pipeline recipe, its data files found, its seed handed on.

    Raises:
        ConfigError: lists every mistake.
    """
    written = read_yaml(path)
    refuse_other_kinds(written, path, "run")
    values = apply_overrides(written, [*environment_overrides(Recipe), *overrides])
    values = _filled(values, values, ())
    stages = values.get("stages")
    if isinstance(stages, dict):
        for stage in stages.values():
            if isinstance(stage, dict):
                place_paths(stage, path.parent)
    return validate(Recipe, values, source=str(path), overrides=overrides)


def load_train_recipe(path: Path, overrides: list[str]) -> TrainConfig:
    """A training recipe, its data files found."""
    written = read_yaml(path)
    refuse_other_kinds(written, path, "train")
    values = apply_overrides(written, [*environment_overrides(TrainConfig), *overrides])
    place_paths(values, path.parent)
    return validate(TrainConfig, values, source=str(path), overrides=overrides)


def place_paths(values: dict[str, Any], folder: Path) -> None:
    """Makes the data paths of a stage absolute: from the recipe's folder if it has the file, else from here."""

    def place(path: Any) -> Any:
        if isinstance(path, list | tuple):
            return [place(part) for part in path]
        if not isinstance(path, str) or is_reference(path):
            return path
        beside = folder / path
        return str((beside if beside.exists() else Path(path)).resolve())

    place_sources(values, folder)
    data = values.get("data")
    if not isinstance(data, dict):
        return
    if values.get("kind") == "evaluate":
        values["data"] = {name: place(path) for name, path in data.items()}
        return
    data = {key: place(value) if key in DATA_PATHS else value for key, value in data.items()}
    for key in ("train", "eval"):
        if isinstance(data.get(key), str):
            data[key] = [data[key]]
    values["data"] = data


def _texts(value: Any) -> Iterator[str]:
    """Every text in nested mappings and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def _replaced(value: Any, pattern: re.Pattern[str], replace: Any) -> Any:
    """A copy in which every text that matches is `replace(match)`."""
    if isinstance(value, str):
        match = pattern.fullmatch(value)
        return replace(match) if match else value
    if isinstance(value, Mapping):
        return {key: _replaced(inner, pattern, replace) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(inner, pattern, replace) for inner in value]
    return value


def _filled(value: Any, recipe: Mapping[str, Any], within: tuple[str, ...]) -> Any:
    """A copy in which `${key.sub}` is the value that stands there.

    Raises:
        ConfigError: nothing stands there, or it leads back to itself.
    """

    def value_at(match: re.Match[str]) -> Any:
        place, here = match[1], recipe
        if place in within:
            raise ConfigError(f"${{{place}}} leads back to itself; write the value in one place")
        for key in place.split("."):
            if not isinstance(here, Mapping) or key not in here:
                known = list(here) if isinstance(here, Mapping) else []
                raise ConfigError(
                    f"${{{place}}}: the recipe has no {key!r} there{suggest(key, known)}"
                )
            here = here[key]
        return _filled(here, recipe, (*within, place))

    return _replaced(value, VALUE_OF, value_at)
