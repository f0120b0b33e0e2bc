"""The implementation of each kind of stage, from its configuration to its results in a folder."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from easyllm.adapters import read_adapter
from easyllm.core.atomic import atomic_directory, write_json
from easyllm.core.config import Config
from easyllm.core.json_types import JsonObject
from easyllm.core.manifest import MANIFEST_FILE, Manifest, hash_file, hash_path
from easyllm.core.progress import track
from easyllm.corpus.build import CorpusBuild
from easyllm.corpus.clean import Cleaner
from easyllm.corpus.config import CorpusConfig, CorpusSource
from easyllm.corpus.document import Document
from easyllm.corpus.sources import SourceConfig, list_splits, read_split, source_files
from easyllm.engine import LLM
from easyllm.evaluate import evaluate_answers
from easyllm.models import (
    ContextConfig,
    load_model,
    load_tokenizer,
    locate,
    pool_kv_heads,
    save_model,
)
from easyllm.models.experts import ExpertChange
from easyllm.models.full_weights import check_finite
from easyllm.pipeline.extension import ModelExtension
from easyllm.pipeline.merge import merge_adapter
from easyllm.pipeline.recipe import (
    ConvertStage,
    CorpusStage,
    EvaluateStage,
    ExtendStage,
    MergeStage,
    TokenizerStage,
    TrainStage,
)
from easyllm.reporting import reporting_callbacks
from easyllm.rl.doctor import report
from easyllm.tokenizer.train import train_tokenizer
from easyllm.tokenizer.train_config import TokenizerConfig
from easyllm.train import TrainConfig, train
from easyllm.train.run import ADAPTER, MODEL

SHARDS = "shards"
RECORDS = "stages"
"""Folder of the stages' records, in a run's folder."""


def run_stage(stage: Config, folder: Path, recipe: str) -> JsonObject:
    """Runs a stage whose references are resolved.

    Args:
        stage: the stage's configuration.
        folder: the folder for the stage's files.
        recipe: the recipe's name.

    Returns:
        The stage's figures, for its record.
    """
    if isinstance(stage, TrainStage):
        return _train(stage, folder, recipe)
    runner: Callable[[Any, Path], JsonObject] = _RUNNERS[type(stage)]
    return runner(stage, folder)


def record_file(folder: Path) -> Path:
    """Returns the file of a stage's key and figures, given the stage's folder."""
    return folder.parent / RECORDS / f"{folder.name}.json"


def product(stage: Config, folder: Path) -> Path:
    """Returns the file or folder that `@name` refers to; of an evaluation, its record."""
    match stage:
        case EvaluateStage():
            return record_file(folder)
        case TrainStage():
            return folder / (ADAPTER if stage.adapter is not None else MODEL)
        case CorpusStage():
            return folder / SHARDS
    return folder


def convert_model(
    source: str,
    folder: Path,
    dtype: str | None = None,
    *,
    num_kv_heads: int | None = None,
    context: ContextConfig | None = None,
    experts: ExpertChange | None = None,
    made_from: str | None = None,
) -> Path:
    """Converts a model to a Hugging Face folder with its tokenizer and a manifest.

    Args:
        source: the model's source.
        folder: the folder to write.
        dtype: dtype of the saved weights; None keeps the model's.
        num_kv_heads: merges the KV heads by mean pooling to this number.
        context: extends the context length (RoPE scaling).
        experts: makes a mixture of experts of a dense model, or merges experts.
        made_from: the source for the manifest, if `source` is a temporary form of it.

    Returns:
        The path of the folder.
    """
    model, tokenizer = load_model(source, dtype=dtype, context=context), load_tokenizer(source)
    if dtype is not None:
        check_finite(model, f"{source} as {dtype}")
    if num_kv_heads is not None:
        pool_kv_heads(model, num_kv_heads)
    if experts is not None:
        experts.apply(model)
    manifest = Manifest.create(
        "convert",
        config={
            "model": made_from or source,
            "dtype": dtype,
            "num_kv_heads": num_kv_heads,
            "context": None if context is None else context.model_dump(),
            "experts": None if experts is None else asdict(experts),
        },
        inputs={"model": hash_path(locate(made_from or source))},
    )
    extra = {MANIFEST_FILE: manifest.model_dump(mode="json")}
    return save_model(model, folder, tokenizer=tokenizer, extra_files=extra)


def _tokenizer(stage: TokenizerStage, folder: Path) -> JsonObject:
    counts = Counter[str]()
    texts = track(_counted_texts(stage.sources, counts), "reading", unit="text")
    config = TokenizerConfig.model_validate(stage.model_dump(exclude={"kind", "sources"}))
    tokenizer = train_tokenizer(texts, config)
    figures = {"vocab_size": tokenizer.vocab_size, **counts}
    if tokenizer.vocab_size < config.vocab_size:
        figures["vocab_size_asked"] = config.vocab_size
    manifest = Manifest.create(
        "tokenizer",
        config=stage.model_dump(mode="json"),
        inputs=_source_hashes(stage.sources),
        results=figures,
    )
    with atomic_directory(folder, replace=True) as work:
        tokenizer.save(work)
        write_json(work / MANIFEST_FILE, manifest.model_dump(mode="json"))
    return figures


def _extend(stage: ExtendStage, folder: Path) -> JsonObject:
    counts = Counter[str]()

    def texts() -> Iterator[str]:
        counts.clear()
        return track(_counted_texts(stage.sources, counts), "reading", unit="text")

    extension = ModelExtension(stage.model, texts, num_new=stage.new, script=stage.script)
    figures = dict(counts) | extension.growth()
    inputs = _source_hashes(stage.sources)
    return figures | extension.save(folder, inputs=inputs, dtype=stage.dtype, replace=True)


def _source_hashes(sources: Mapping[str, SourceConfig]) -> dict[str, str]:
    """Returns the hash of each file of the sources, by its path."""
    files = (file.path for source in sources.values() for file in source_files(source))
    return {str(path): hash_file(Path(path)) for path in files}


def _counted_texts(sources: Mapping[str, CorpusSource], counts: Counter[str]) -> Iterator[str]:
    """Yields the texts of all sources, cleaned if the source is configured so, and counts them."""
    for name, source in sources.items():
        cleaner = None if source.clean is None else Cleaner(source.clean)
        for split in list_splits(name, source):
            for row in read_split(split, source):
                kept: object = row
                if cleaner is not None and isinstance(row, Document):
                    kept = cleaner.clean(row)
                if not isinstance(kept, Document):
                    counts["left_out"] += 1
                    continue
                counts["documents"] += 1
                counts["bytes"] += len(kept.text.encode("utf-8", "replace"))
                yield kept.text


def _corpus(stage: CorpusStage, folder: Path) -> JsonObject:
    values = stage.model_dump(exclude={"kind"})
    config = CorpusConfig.model_validate(values | {"name": folder.name, "output": str(folder)})
    return CorpusBuild(config, load_tokenizer(config.tokenizer)).run()


def _convert(stage: ConvertStage, folder: Path) -> JsonObject:
    convert_model(stage.model, folder, stage.dtype, num_kv_heads=stage.num_kv_heads)
    return {}


def _evaluate(stage: EvaluateStage, _folder: Path) -> JsonObject:
    llm = LLM(stage.model)
    return {
        name: evaluate_answers(llm, Path(path), max_tokens=stage.max_tokens).as_dict()
        for name, path in stage.data.items()
    }


def _train(stage: TrainStage, folder: Path, recipe: str) -> JsonObject:
    # the training finished, but was interrupted before its record was written
    if (folder / MANIFEST_FILE).is_file():
        return Manifest.read(folder / MANIFEST_FILE).results
    config = train_config(stage)
    callbacks = reporting_callbacks(
        config, f"{recipe}/{folder.name}", root=folder.parent, diagnose=report
    )
    return train(config, folder, callbacks=callbacks).figures


def train_config(stage: TrainStage) -> TrainConfig:
    """Returns a stage's configuration as that of a stand-alone training."""
    return TrainConfig.model_validate(stage.model_dump(exclude={"kind"}))


def _merge(stage: MergeStage, folder: Path) -> JsonObject:
    if (
        stage.virtual_tokens == "keep"
        and read_adapter(Path(stage.adapter)).kind.config.level == "model"
    ):
        with atomic_directory(folder, replace=True) as work:
            shutil.copytree(stage.adapter, work, dirs_exist_ok=True)
        return {"kept_as_adapter": True}
    merged = merge_adapter(stage.model, Path(stage.adapter), folder, check=stage.check)
    return {} if merged.gate is None else merged.gate.as_dict()


_RUNNERS: dict[type[Config], Callable[[Any, Path], JsonObject]] = {
    TokenizerStage: _tokenizer,
    CorpusStage: _corpus,
    ConvertStage: _convert,
    EvaluateStage: _evaluate,
    MergeStage: _merge,
    ExtendStage: _extend,
}
