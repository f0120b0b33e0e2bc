"""What a run trains on: a loader of steps, an evaluation, and an account of the rows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from easyllm.core.errors import ConfigError
from easyllm.core.manifest import hash_file
from easyllm.data.conversations import read_conversations
from easyllm.data.labelled import prepare_labelled_texts
from easyllm.data.loader import Loader
from easyllm.data.packing import Batch, Sample, pack, split_by_tokens
from easyllm.data.prepare import Account, prepare_conversations
from easyllm.data.rows_of_shards import ShardLoader, validation_batches
from easyllm.data.shards import MANIFEST, TokenShards
from easyllm.nn.decoder import Decoder
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.train.config import (
    ClassifierConfig,
    CorpusDataConfig,
    DataConfig,
    LabelledDataConfig,
    TrainConfig,
)
from easyllm.train.loop import StepLoader, mean_loss
from easyllm.train.objectives import Objective

Evaluation = Callable[[Decoder, Objective], dict[str, float]]


@dataclass(frozen=True, slots=True)
class Material:
    """What a run trains on.

    Attributes:
        loader: gives the steps.
        evaluate: figures of the evaluation data, None where there is none.
        tokens_per_epoch: tokens of all samples.
        summary: a line for people; warnings: what they should know.
        figures: for the manifest.
        inputs: hashes of the files.
    """

    loader: StepLoader
    evaluate: Evaluation | None
    tokens_per_epoch: int
    summary: str
    warnings: list[str]
    figures: dict[str, Any]
    inputs: dict[str, str]


def gather(config: TrainConfig, tokenizer: Tokenizer, *, context: int) -> Material:
    """Reads the data a recipe names.

    Args:
        context: the longest sequence the model takes.

    Raises:
        ConfigError, DataError: the data cannot be used, or nothing in it is trained.
    """
    if config.data.max_seq_len > context:
        raise ConfigError(
            f"data.max_seq_len={config.data.max_seq_len} is longer than the model's context of {context}; lower it"
        )
    if isinstance(config.data, CorpusDataConfig):
        material = _corpus(config, config.data, tokenizer)
    else:
        material = _rows(config, config.data, tokenizer)
    if material.evaluate is None:
        _nothing_to_evaluate(config, material.warnings)
    return material


def _nothing_to_evaluate(config: TrainConfig, warnings: list[str]) -> None:
    where = "data.validation" if isinstance(config.data, CorpusDataConfig) else "data.eval"
    for key in ("keep_best", "early_stopping"):
        if getattr(config, key):
            raise ConfigError(
                f"{key} goes by evaluations, and there is nothing to evaluate on; set {where}, or remove {key}"
            )
    if config.eval_every and config.samples is None:
        warnings.append(
            f"there is nothing to evaluate on every {config.eval_every} steps; set {where}"
        )


def _rows(
    config: TrainConfig, data: DataConfig | LabelledDataConfig, tokenizer: Tokenizer
) -> Material:
    train, account = _samples(config, data.train, tokenizer)
    held = _samples(config, data.eval, tokenizer)[0] if data.eval else []
    loader = Loader(
        train,
        batch_size=config.batch_size,
        batch_tokens=config.batch_tokens,
        micro_batch_tokens=config.micro_batch_tokens,
        seed=config.seed,
    )
    return Material(
        loader=loader,
        evaluate=_mean_loss_on(held, config.micro_batch_tokens) if held else None,
        tokens_per_epoch=account.tokens,
        summary=account.summary(),
        warnings=_overlap(train, held),
        figures=account.as_dict(),
        inputs={file: hash_file(Path(file)) for file in (*data.train, *data.eval)},
    )


def _samples(
    config: TrainConfig, files: Sequence[str], tokenizer: Tokenizer
) -> tuple[list[Sample], Account]:
    data = config.data
    if isinstance(data, LabelledDataConfig):
        assert isinstance(config.objective, ClassifierConfig), "checked by the configuration"
        return prepare_labelled_texts(
            [Path(file) for file in files],
            tokenizer,
            text_key=data.text_key,
            label_key=data.label_key,
            num_labels=config.objective.num_labels,
            max_seq_len=data.max_seq_len,
        )
    assert isinstance(data, DataConfig), "a corpus has no rows"
    return prepare_conversations(
        chain.from_iterable(read_conversations(Path(file)) for file in files),
        tokenizer,
        max_seq_len=data.max_seq_len,
        overlong=data.overlong,
        train_on=data.train_on,
        split_turns=data.split_turns,
    )


def _mean_loss_on(samples: list[Sample], micro_batch_tokens: int) -> Evaluation:
    def evaluate(model: Decoder, objective: Objective) -> dict[str, float]:
        groups = split_by_tokens(samples, micro_batch_tokens)
        return {"eval/loss_nats": mean_loss(model, objective, (pack(g) for g in groups))}

    return evaluate


def _overlap(train: list[Sample], held: list[Sample]) -> list[str]:
    """Evaluation on what was trained measures memory."""
    seen = {sample.token_ids for sample in train}
    shared = sum(sample.token_ids in seen for sample in held)
    if not shared:
        return []
    return [
        f"{shared} of {len(held)} evaluation samples are training samples, too: their loss measures memory, "
        "not skill"
    ]


def _corpus(config: TrainConfig, data: CorpusDataConfig, tokenizer: Tokenizer) -> Material:
    shards = TokenShards(Path(data.shards), tokenizer=tokenizer)
    loader = ShardLoader(
        shards,
        row_tokens=data.max_seq_len,
        batch_size=config.batch_size,
        batch_tokens=config.batch_tokens,
        micro_batch_tokens=config.micro_batch_tokens,
        seed=config.seed,
    )
    folder = Path(data.validation) if data.validation else Path(data.shards) / "validation"
    evaluate, warnings = None, []
    inputs = {str(data.shards): hash_file(Path(data.shards) / MANIFEST)}
    if data.validation or (folder / MANIFEST).is_file():
        inputs[str(folder)] = hash_file(folder / MANIFEST)
        held = TokenShards(folder, tokenizer=tokenizer)
        if inputs[str(folder)] == inputs[str(data.shards)]:
            warnings.append("the evaluation data are the training data: their loss measures memory")
        evaluate = _bits_per_byte_on(held, config, data, tokenizer)
    manifest = shards.manifest
    return Material(
        loader=loader,
        evaluate=evaluate,
        tokens_per_epoch=manifest.tokens,
        summary=f"{manifest.tokens:,} tokens of {manifest.documents:,} documents, all trained",
        warnings=warnings,
        figures={"tokens": manifest.tokens, "documents": manifest.documents},
        inputs=inputs,
    )


def _bits_per_byte_on(
    shards: TokenShards, config: TrainConfig, data: CorpusDataConfig, tokenizer: Tokenizer
) -> Evaluation:
    validation = validation_batches(
        shards,
        tokenizer,
        row_tokens=data.max_seq_len,
        max_tokens=data.eval_tokens,
        micro_batch_tokens=config.micro_batch_tokens,
    )

    def evaluate(model: Decoder, objective: Objective) -> dict[str, float]:
        batches: list[Batch] = validation.batches
        loss = mean_loss(model, objective, batches)
        trained = sum(batch.num_trained for batch in batches)
        bits = loss * trained / math.log(2) / max(1, validation.num_bytes)
        return {"eval/loss_nats": loss, "eval/bits_per_byte": bits}

    return evaluate
