"""Configuration of a corpus: the recipe of `easyllm data build`."""

import glob
import os
import sysconfig
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from easyllm.core.config import (
    Config,
    validate,
)
from easyllm.core.errors import ConfigError, SourceError, suggest
from easyllm.core.json_types import Json, JsonObject
from easyllm.core.paths import PathText
from easyllm.core.recipe_kind import read_recipe
from easyllm.corpus.clean import CleanConfig
from easyllm.corpus.decontaminate import DecontaminationConfig
from easyllm.corpus.dedup import DedupConfig, DedupPresetName, dedup_preset
from easyllm.corpus.executor import Engine
from easyllm.corpus.mixture import MixtureConfig
from easyllm.corpus.privacy import PrivacyConfig
from easyllm.corpus.sources import SourceConfig

PYTHON_SOURCES = "python:stdlib"
"""Path that stands for the Python source files of the running interpreter's standard library.

They provide text on every machine without a download.
"""
NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


class CorpusSource(SourceConfig):
    """A source of documents, optionally with its own cleaning rules."""

    clean: CleanConfig | None = Field(
        None, description="Cleaning rules of this source; by default those of the recipe."
    )


class EvaluationSets(DecontaminationConfig):
    """Evaluation sets whose n-grams no document may contain."""

    sets: dict[str, SourceConfig] = Field(
        min_length=1, description="Evaluation sets by name: the files that contain their texts."
    )


class PackConfig(Config):
    """How documents are packed into shards."""

    end_token: str | None = Field(
        None,
        description="Special token appended to every document; by default `<|endoftext|>` if the "
        "tokenizer has it, else the tokenizer's EOS token.",
    )
    shard_tokens: PositiveInt = Field(
        2**27, description="Approximate number of token ids per shard file."
    )
    holdout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="Fraction of the documents held out for validation in `shards/validation`; "
        "if a source is a single document, its last tokens are held out.",
    )
    holdout_tail: bool = Field(
        False,
        description="Hold out the last tokens of each source instead of random documents; the "
        "document that contains the boundary is split in two.",
    )

    @model_validator(mode="after")
    def _tail_has_a_size(self) -> "PackConfig":
        if self.holdout_tail and not self.holdout:
            raise ValueError("holdout_tail requires holdout > 0; set holdout, for example to 0.1")
        return self


class CorpusParts(Config):
    """A corpus, from its sources to shards of tokens.

    The steps are: sources → clean → private data → decontaminate → dedup → tokens → mixture →
    shards.
    """

    tokenizer: str = Field("smollm2", description="A model's source, or a folder with a tokenizer.")
    sources: dict[str, CorpusSource] = Field(
        min_length=1, description="Sources of documents by name."
    )
    clean: CleanConfig | None = Field(
        CleanConfig(),
        description="Cleaning rules for every source without its own rules; null leaves "
        "documents unchanged.",
    )
    privacy: PrivacyConfig | None = Field(
        PrivacyConfig(),
        description="How personal data is detected and handled; null skips the step.",
    )
    decontaminate: EvaluationSets | None = Field(
        None,
        description="Evaluation sets whose n-grams no document may contain; null skips the step.",
    )
    dedup: DedupConfig | None = Field(
        DedupConfig(),
        description="Deduplication steps, or the name of a preset (`default`, `fineweb`); null "
        "skips the step.",
    )
    mixture: MixtureConfig = Field(
        MixtureConfig(), description="How many tokens are sampled from each source."
    )
    pack: PackConfig = Field(PackConfig(), description="Packing of the documents into shards.")
    seed: NonNegativeInt = Field(0, description="Seed of the random sampling and shuffling.")
    engine: Engine = Field(
        "local", description="Where the work runs: in `local` processes, or on `ray`."
    )
    workers: PositiveInt | None = Field(
        None, description="Number of worker processes; by default one per core."
    )
    split_bytes: PositiveInt = Field(
        64 * 2**20, description="Approximate size of a work item, in bytes of input."
    )
    keep_work: bool = Field(False, description="Keep intermediate files after the build.")

    @field_validator(
        "dedup", mode="before", json_schema_input_type=DedupPresetName | DedupConfig | None
    )
    @classmethod
    def _preset(cls, value: object) -> Json:
        return dedup_preset(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _shares_name_sources(self) -> Self:
        for name in self.mixture.shares:
            if name not in self.sources:
                raise ValueError(
                    f"mixture.shares names {name!r}, which is not a source"
                    f"{suggest(name, self.sources)}"
                )
        return self

    def rules_of(self, source: str) -> CleanConfig | None:
        """Returns the cleaning rules of a source, or None if its documents are not cleaned."""
        return self.sources[source].clean or self.clean


class CorpusConfig(CorpusParts):
    """A standalone corpus, with a name and an output folder."""

    name: str = Field(description="Name of the corpus.")
    output: PathText = Field(description="Folder for the result.")


def load_corpus(path: Path, overrides: list[str]) -> CorpusConfig:
    """Loads a corpus recipe.

    Relative paths in it are resolved against the recipe's folder first, then against the current
    directory.

    Args:
        path: the recipe file.
        overrides: `key=value` overrides from the command line.

    Raises:
        SourceError, ConfigError: the file does not exist, or is invalid; all errors are listed.
    """
    values = read_recipe(path, CorpusConfig, "data build", overrides)
    resolve_sources(values, path.parent)
    return validate(CorpusConfig, values, source=str(path), overrides=overrides)


def resolve_sources(values: JsonObject, folder: Path) -> None:
    """Resolves the paths of all sources of a recipe in place.

    A path that matches files in the recipe's folder is resolved against that folder;
    `python:stdlib` is replaced by patterns for the standard library's files.

    Args:
        values: the recipe as read from YAML.
        folder: the folder of the recipe.

    Raises:
        ConfigError: `python:stdlib` is not the only path of its source.
        SourceError: this Python installation has no source files.
    """
    decontaminate = values.get("decontaminate")
    sets = decontaminate.get("sets") if isinstance(decontaminate, dict) else None
    for sources in (values.get("sources"), sets):
        for source in sources.values() if isinstance(sources, dict) else ():
            if isinstance(source, dict) and "paths" in source:
                source["paths"] = _placed(source["paths"], folder)
                _resolve_python(source)


def _placed(paths: object, folder: Path) -> Json:
    """Returns paths and globs, resolved against the recipe's folder if they match files in it."""
    if isinstance(paths, str):
        paths = [paths]
    if not isinstance(paths, list):
        return paths
    return [_beside(path, folder) if isinstance(path, str) else path for path in paths]


def _beside(path: str, folder: Path) -> str:
    found = not Path(path).is_absolute() and any(folder.glob(path))
    return str(folder / path) if found else path


def _resolve_python(source: JsonObject) -> None:
    if not isinstance(source["paths"], list) or PYTHON_SOURCES not in source["paths"]:
        return
    if len(source["paths"]) > 1:
        raise ConfigError(
            f"{PYTHON_SOURCES} must be the only path of its source; "
            "move the other paths to a separate source"
        )
    source["paths"] = _python_sources()
    source.setdefault("format", "text")


def _python_sources() -> list[str]:
    """Returns a glob for each folder of the standard library with Python files, except tests."""
    root, patterns = sysconfig.get_paths()["stdlib"], []
    for here, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in NOT_LIBRARY]
        if any(name.endswith(".py") for name in files):
            patterns.append(os.path.join(glob.escape(here), "*.py"))
    if not patterns:
        raise SourceError(
            f"this Python installation has no source files in {root!r}; name text files instead"
        )
    return sorted(patterns)
