"""Recipes: a YAML file of named stages. `@name` stands for what stage `name` made."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

import easyllm
from easyllm.core.config import Config, apply_overrides, environment_overrides, read_yaml, validate
from easyllm.core.errors import ConfigError, SourceError, suggest
from easyllm.train.config import TrainConfig


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
    ConvertStage | EvaluateStage | TrainStage | MergeStage, Field(discriminator="kind")
]


class Recipe(Config):
    """A pipeline. The seed is that of every training stage that names none of its own."""

    name: str
    output: str
    seed: NonNegativeInt = 0
    stages: dict[str, Stage] = Field(min_length=1)

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
    """Names of the stages whose results a stage uses."""
    values = (getattr(stage, "model", ""), getattr(stage, "adapter", ""))
    return [v[1:] for v in values if isinstance(v, str) and v.startswith("@")]


def recipes_folder() -> Path:
    """Where the recipes that ship with the toolkit lie (inside a wheel, or beside `src` in a checkout)."""
    package = Path(easyllm.__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parents[1] / "recipes"


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
    values = apply_overrides(read_yaml(path), [*environment_overrides(Recipe), *overrides])
    if "stages" not in values and "data" in values:
        raise ConfigError(f"{path} is a training recipe, not a pipeline; use: easyllm train {path}")
    stages = values.get("stages")
    if isinstance(stages, dict):
        for stage in stages.values():
            if isinstance(stage, dict):
                place_paths(stage, path.parent)
                if stage.get("kind") == "train":
                    stage.setdefault("seed", values.get("seed", 0))
    return validate(Recipe, values, source=str(path))


def load_train_recipe(path: Path, overrides: list[str]) -> TrainConfig:
    """A training recipe, its data files found."""
    values = apply_overrides(read_yaml(path), [*environment_overrides(TrainConfig), *overrides])
    if "stages" in values:
        raise ConfigError(f"{path} is a pipeline, not a training recipe; use: easyllm run {path}")
    place_paths(values, path.parent)
    return validate(TrainConfig, values, source=str(path))


def place_paths(values: dict[str, Any], folder: Path) -> None:
    """Makes the data paths of a stage absolute: from the recipe's folder if it has the file, else from here."""

    def place(path: Any) -> Any:
        if isinstance(path, list | tuple):
            return [place(part) for part in path]
        if not isinstance(path, str):
            return path
        beside = folder / path
        return str((beside if beside.exists() else Path(path)).resolve())

    data = values.get("data")
    if isinstance(data, dict):
        if "kind" in values and values["kind"] == "evaluate":
            values["data"] = {name: place(path) for name, path in data.items()}
        else:
            values["data"] = {k: place(v) if k in ("train", "eval") else v for k, v in data.items()}
            train = values["data"].get("train")
            if isinstance(train, str):
                values["data"]["train"] = [train]
            if isinstance(values["data"].get("eval"), str):
                values["data"]["eval"] = [values["data"]["eval"]]
