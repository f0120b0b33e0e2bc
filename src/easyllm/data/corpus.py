"""What a corpus is made of: the recipe of `easyllm data build`."""

import glob
import os
import sysconfig
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from easyllm.core.config import (
    Config,
    apply_overrides,
    environment_overrides,
    read_yaml,
    validate,
)
from easyllm.core.errors import ConfigError, SourceError, suggest
from easyllm.core.recipe_kind import refuse_other_kinds
from easyllm.data.clean import CleanConfig
from easyllm.data.decontaminate import DecontaminationConfig
from easyllm.data.dedup import DedupConfig, dedup_preset
from easyllm.data.executor import Engine
from easyllm.data.mixture import MixtureConfig
from easyllm.data.privacy import PrivacyConfig
from easyllm.data.sources import SourceConfig

PYTHON_SOURCES = "python:stdlib"
"""A path that stands for the Python sources of the running interpreter's standard library: text on every machine."""
NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


class CorpusSource(SourceConfig):
    """A source, and how it is cleaned where it differs from the others."""

    clean: CleanConfig | None = None


class EvaluationSets(DecontaminationConfig):
    """Evaluation files whose texts no document may hold."""

    sets: dict[str, SourceConfig] = Field(min_length=1)


class PackConfig(Config):
    """How documents become shards.

    Attributes:
        end_token: put behind every document; by default `<|endoftext|>` where the tokenizer has it, else its end token.
        shard_tokens: about so many ids a file.
        holdout: share of the documents kept apart in `shards/validation`; where a source is one document, its last tokens.
        holdout_tail: keep the last tokens of each source apart, instead of documents at random; the document they begin in
            is cut in two.
    """

    end_token: str | None = None
    shard_tokens: PositiveInt = 2**27
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    holdout_tail: bool = False

    @model_validator(mode="after")
    def _tail_has_a_size(self) -> "PackConfig":
        if self.holdout_tail and not self.holdout:
            raise ValueError("holdout_tail needs a share to keep apart; set holdout to 0.1, say")
        return self


class CorpusParts(Config):
    """A corpus: sources → clean → private data → decontaminate → dedup → tokens → mixture → shards.

    Attributes:
        tokenizer: a model's source, or a folder with a tokenizer.
        clean: rules for every source that has none of its own; null takes documents as they are.
        privacy, decontaminate, dedup: null leaves the step out; `dedup` may be the name of a preset.
        engine: `local` processes, or `ray`.
        workers: processes; by default one a core.
        split_bytes: about so much of the input is one item of work.
        keep_work: whether intermediate files stay.
    """

    tokenizer: str = "smollm2"
    sources: dict[str, CorpusSource] = Field(min_length=1)
    clean: CleanConfig | None = CleanConfig()
    privacy: PrivacyConfig | None = PrivacyConfig()
    decontaminate: EvaluationSets | None = None
    dedup: DedupConfig | None = DedupConfig()
    mixture: MixtureConfig = MixtureConfig()
    pack: PackConfig = PackConfig()
    seed: NonNegativeInt = 0
    engine: Engine = "local"
    workers: PositiveInt | None = None
    split_bytes: PositiveInt = 64 * 2**20
    keep_work: bool = False

    @field_validator("dedup", mode="before")
    @classmethod
    def _preset(cls, value: Any) -> Any:
        return dedup_preset(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _shares_name_sources(self) -> Self:
        for name in self.mixture.shares:
            if name not in self.sources:
                raise ValueError(
                    f"mixture.shares names {name!r}, which is no source{suggest(name, self.sources)}"
                )
        return self

    def rules_of(self, source: str) -> CleanConfig | None:
        """How a source is cleaned."""
        return self.sources[source].clean or self.clean


class CorpusConfig(CorpusParts):
    """A corpus that is built alone: with a name, and a folder for its files."""

    name: str
    output: str


def load_corpus(path: Path, overrides: list[str]) -> CorpusConfig:
    """A corpus recipe; its paths are looked up from the recipe's folder first, then from here.

    Raises:
        SourceError, ConfigError: there is no such file, or it is wrong; every mistake is listed.
    """
    written = read_yaml(path)
    refuse_other_kinds(written, path, "data build")
    values = apply_overrides(written, [*environment_overrides(CorpusConfig), *overrides])
    place_sources(values, path.parent)
    return validate(CorpusConfig, values, source=str(path), overrides=overrides)


def place_sources(values: dict[str, Any], folder: Path) -> None:
    """Looks up the paths of all sources of a recipe from its own folder, where that has them; `python:stdlib` is resolved.

    Raises:
        ConfigError: `python:stdlib` is not the only path of its source.
        SourceError: this Python carries no sources.
    """
    decontaminate = values.get("decontaminate")
    sets = decontaminate.get("sets") if isinstance(decontaminate, dict) else None
    for sources in (values.get("sources"), sets):
        for source in sources.values() if isinstance(sources, dict) else ():
            if isinstance(source, dict) and "paths" in source:
                source["paths"] = _placed(source["paths"], folder)
                _resolve_python(source)


def _placed(paths: Any, folder: Path) -> Any:
    """Paths and globs as the recipe's folder has them, where it has them."""
    if isinstance(paths, str):
        paths = [paths]
    if not isinstance(paths, list):
        return paths
    return [_beside(path, folder) if isinstance(path, str) else path for path in paths]


def _beside(path: str, folder: Path) -> str:
    found = not Path(path).is_absolute() and any(folder.glob(path))
    return str(folder / path) if found else path


def _resolve_python(source: dict[str, Any]) -> None:
    if not isinstance(source["paths"], list) or PYTHON_SOURCES not in source["paths"]:
        return
    if len(source["paths"]) > 1:
        raise ConfigError(
            f"{PYTHON_SOURCES} must be the only path of its source; put the others into a source of their own"
        )
    source["paths"] = _python_sources()
    source.setdefault("format", "text")


def _python_sources() -> list[str]:
    """A pattern for each folder of the standard library with Python sources, those of tests left out."""
    root, patterns = sysconfig.get_paths()["stdlib"], []
    for here, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in NOT_LIBRARY]
        if any(name.endswith(".py") for name in files):
            patterns.append(os.path.join(glob.escape(here), "*.py"))
    if not patterns:
        raise SourceError(f"this Python has no sources in {root!r}; name text files")
    return sorted(patterns)
