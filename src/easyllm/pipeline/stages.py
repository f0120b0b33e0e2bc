"""What each kind of stage does: a configuration and a folder in, results out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from easyllm.adapters import load_adapter, merge
from easyllm.core.config import Config
from easyllm.core.manifest import MANIFEST_FILE, Manifest, hash_path
from easyllm.engine import LLM
from easyllm.evaluate import evaluate_answers
from easyllm.models import (
    ContextConfig,
    hf_module_name,
    load_model,
    load_tokenizer,
    locate,
    pool_kv_heads,
    save_model,
)
from easyllm.pipeline.recipe import ConvertStage, EvaluateStage, MergeStage, TrainStage
from easyllm.train import TrainConfig, train
from easyllm.train.run import ADAPTER, MODEL


def run_stage(stage: Config, folder: Path) -> dict[str, Any]:
    """Runs a stage whose references are resolved; its files go to `folder`, its figures are returned."""
    runner: Callable[[Any, Path], dict[str, Any]] = _RUNNERS[type(stage)]
    return runner(stage, folder)


def product(stage: Config, folder: Path) -> Path:
    """What `@name` stands for: the file or folder a finished stage is used by."""
    if isinstance(stage, TrainStage):
        return folder / (ADAPTER if stage.adapter is not None else MODEL)
    return folder


def convert_model(
    source: str,
    folder: Path,
    dtype: str | None = None,
    *,
    num_kv_heads: int | None = None,
    context: ContextConfig | None = None,
) -> Path:
    """Rewrites a model as a Hugging Face folder with its tokenizer and a manifest.

    Args:
        num_kv_heads: pools the key-value heads to so many.
        context: writes positions that reach further.
    """
    model, tokenizer = load_model(source, dtype=dtype, context=context), load_tokenizer(source)
    if num_kv_heads is not None:
        pool_kv_heads(model, num_kv_heads)
    manifest = Manifest.create(
        "convert",
        config={
            "model": source,
            "dtype": dtype,
            "num_kv_heads": num_kv_heads,
            "context": None if context is None else context.model_dump(),
        },
        inputs={"model": hash_path(locate(source))},
    )
    extra = {MANIFEST_FILE: manifest.model_dump(mode="json")}
    return save_model(model, folder, tokenizer=tokenizer, extra_files=extra)


def merge_adapter(source: str, adapter: Path, folder: Path) -> Path:
    """Folds an adapter into its base in fp32 and saves the whole as a Hugging Face folder."""
    model = load_model(source, dtype="float32")
    merge(load_adapter(model, adapter, module_name=hf_module_name(model)))
    manifest = Manifest.create(
        "merge",
        config={"model": source, "adapter": str(adapter)},
        inputs={"model": hash_path(locate(source)), "adapter": hash_path(adapter)},
    )
    extra = {MANIFEST_FILE: manifest.model_dump(mode="json")}
    return save_model(model, folder, tokenizer=load_tokenizer(source), extra_files=extra)


def _convert(stage: ConvertStage, folder: Path) -> dict[str, Any]:
    convert_model(stage.model, folder, stage.dtype, num_kv_heads=stage.num_kv_heads)
    return {}


def _evaluate(stage: EvaluateStage, folder: Path) -> dict[str, Any]:
    llm = LLM(stage.model)
    return {
        name: evaluate_answers(llm, Path(path), max_tokens=stage.max_tokens).as_dict()
        for name, path in stage.data.items()
    }


def _train(stage: TrainStage, folder: Path) -> dict[str, Any]:
    if (folder / MANIFEST_FILE).is_file():  # finished, and interrupted before that was noted
        return Manifest.read(folder / MANIFEST_FILE).results
    config = TrainConfig.model_validate(stage.model_dump(exclude={"kind"}))
    return train(config, folder).figures


def _merge(stage: MergeStage, folder: Path) -> dict[str, Any]:
    merge_adapter(stage.model, Path(stage.adapter), folder)
    return {}


_RUNNERS: dict[type[Config], Callable[[Any, Path], dict[str, Any]]] = {
    ConvertStage: _convert,
    EvaluateStage: _evaluate,
    TrainStage: _train,
    MergeStage: _merge,
}
