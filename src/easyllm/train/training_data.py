"""The training data of a run: a loader, an evaluation function and statistics of the rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from easyllm.batches.corpus_rows import ShardLoader, validation_batches
from easyllm.batches.loader import Loader, StepLoader
from easyllm.batches.packing import pack
from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonObject
from easyllm.core.manifest import hash_file, hash_value
from easyllm.corpus.shards import MANIFEST, TokenShards
from easyllm.examples.sample import AnySample
from easyllm.nn.config import ModelConfig
from easyllm.nn.decoder import Decoder
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.train.config import TrainConfig
from easyllm.train.data_config import CorpusDataConfig, GeneratedConfig, RowsConfig
from easyllm.train.objectives import Objective, StepSizes
from easyllm.train.objectives.losses import bits_per_byte

Evaluation = Callable[[Decoder, Objective], dict[str, float]]


@dataclass(frozen=True, slots=True)
class TrainingData:
    """The data of a run.

    Attributes:
        loader: yields the micro-batches of each step.
        evaluate: computes metrics on the evaluation data; None if there is none.
        tokens_per_epoch: number of tokens in all training samples.
        shared_per_epoch: number of those that are in a prompt which is computed once for several
            sequences, where the model allows it.
        summary: one line of text about the data.
        warnings: warnings about the data, one line each.
        figures: statistics of the data, for the manifest.
        inputs: hashes of the data files, by path.
        held: evaluation samples; empty for a corpus.
        retention: samples of the retention set, which is not part of the run's identity.
    """

    loader: StepLoader
    evaluate: Evaluation | None
    tokens_per_epoch: int
    summary: str
    warnings: list[str]
    figures: JsonObject
    inputs: dict[str, str]
    held: Sequence[AnySample] = ()
    retention: Sequence[AnySample] = ()
    shared_per_epoch: int = 0

    @property
    def identity(self) -> str:
        """A hash of the contents of all data files."""
        return hash_value(sorted(self.inputs.values()))

    def encoder_tokens(self, model: ModelConfig, row: int) -> tuple[int] | None:
        """Returns how many of `row` tokens an encoder reads, by the samples of the first step.

        None for a decoder.
        """
        if model.encoder is None or not isinstance(self.loader, Loader):
            return None
        batch = pack(self.loader.samples_of(1))
        return (row * sum(batch.prefix_lengths(model)) // sum(batch.lengths),)


def load_training_data(
    config: TrainConfig, tokenizer: Tokenizer, objective: Objective, *, context: int
) -> TrainingData:
    """Reads the data that a recipe names.

    Args:
        config: the run's configuration.
        tokenizer: the model's tokenizer.
        objective: converts rows to samples.
        context: the model's maximum sequence length.

    Raises:
        ConfigError, DataError: the data cannot be used, or contains no token to train on.
    """
    if config.data.max_seq_len > context:
        raise ConfigError(
            f"data.max_seq_len={config.data.max_seq_len} is longer than the model's context of "
            f"{context}; lower it"
        )
    if isinstance(config.data, CorpusDataConfig):
        training_data = _corpus(config, config.data, tokenizer)
    else:
        assert isinstance(config.data, RowsConfig | GeneratedConfig), "data are rows or a corpus"
        training_data = _rows(config, config.data, tokenizer, objective)
    if training_data.evaluate is None:
        _nothing_to_evaluate(config, training_data.warnings)
    return training_data


def _nothing_to_evaluate(config: TrainConfig, warnings: list[str]) -> None:
    where = "data.validation" if isinstance(config.data, CorpusDataConfig) else "data.eval"
    for key in ("keep_best", "early_stopping"):
        if getattr(config, key):
            raise ConfigError(
                f"{key} needs evaluations, but there is no evaluation data; set {where}, "
                f"or remove {key}"
            )
    if config.eval_every and config.samples is None:
        warnings.append(
            f"eval_every={config.eval_every} has no effect without evaluation data; set {where}"
        )


def _rows(
    config: TrainConfig,
    data: RowsConfig | GeneratedConfig,
    tokenizer: Tokenizer,
    objective: Objective,
) -> TrainingData:
    train_files, eval_files = ([Path(file) for file in files] for files in data.files)
    train, account = objective.prepare(data, train_files, tokenizer)
    held: Sequence[AnySample] = ()
    if data.has_eval:
        held = objective.prepare_eval(data, eval_files, tokenizer)
    sizes = StepSizes(
        batch_size=config.batch_size,
        batch_tokens=config.batch_tokens,
        micro_batch_tokens=config.micro_batch_tokens,
        seed=config.seed,
    )
    loader = objective.build_loader(train, sizes)
    return TrainingData(
        loader=loader,
        evaluate=_figures_on(held, config.micro_batch_tokens) if held else None,
        tokens_per_epoch=account.tokens,
        summary=account.summary(),
        warnings=_overlap(train, held),
        figures=account.as_dict(),
        inputs={str(file): hash_file(file) for file in (*train_files, *eval_files)},
        held=held,
        shared_per_epoch=objective.num_shared_tokens(train),
    )


def _figures_on(samples: Sequence[AnySample], micro_batch_tokens: int) -> Evaluation:
    def evaluate(model: Decoder, objective: Objective) -> dict[str, float]:
        figures = objective.evaluate_samples(model, samples, micro_batch_tokens)
        return {f"eval/{name}": value for name, value in figures.items()}

    return evaluate


def _overlap(train: Sequence[AnySample], held: Sequence[AnySample]) -> list[str]:
    """Returns a warning if evaluation samples are also training samples, which are memorised."""
    if not held:
        return []
    seen = {tuple(part.token_ids for part in sample.parts) for sample in train}
    shared = sum(tuple(part.token_ids for part in sample.parts) in seen for sample in held)
    if not shared:
        return []
    return [
        f"{shared} of {len(held)} evaluation samples are also training samples: their loss "
        "measures memorisation, not generalisation"
    ]


def _corpus(config: TrainConfig, data: CorpusDataConfig, tokenizer: Tokenizer) -> TrainingData:
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
            warnings.append(
                "the evaluation data are the training data: their loss measures memorisation"
            )
        evaluate = _bits_per_byte_on(held, config, data, tokenizer)
    manifest = shards.manifest
    return TrainingData(
        loader=loader,
        evaluate=evaluate,
        tokens_per_epoch=manifest.tokens,
        summary=f"{manifest.tokens:,} tokens in {manifest.documents:,} documents, all trained on",
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
        batches = validation.batches
        figures = objective.evaluate(model, batches)
        trained = sum(batch.num_trained for batch in batches)
        bits = bits_per_byte(figures["loss_nats"] * trained, max(1, validation.num_bytes))
        named = {f"eval/{name}": value for name, value in figures.items()}
        return named | {"eval/bits_per_byte": bits}

    return evaluate
