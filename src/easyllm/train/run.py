"""A training run from its configuration to its result on disk.

run/recipe.yaml      the configuration, resolved
run/metrics.jsonl    a line a step
run/checkpoints/     to go on from after an interruption
run/adapter/         the result of training an adapter; run/model/ of training every weight
run/manifest.json    inputs, versions, results: written last, so its presence means the run is whole
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from easyllm.adapters import adapter_parameters, attach, save_adapter
from easyllm.core.atomic import write_atomic
from easyllm.core.device import bf16_is_fast, peak_rss_bytes, pick_device
from easyllm.core.errors import ConfigError, OutputError
from easyllm.core.manifest import MANIFEST_FILE, Manifest, hash_file, hash_path
from easyllm.core.progress import console
from easyllm.core.run_folder import check_free, claim
from easyllm.data.conversations import read_conversations
from easyllm.data.loader import Loader
from easyllm.data.packing import Sample, pack, split_by_tokens
from easyllm.data.prepare import Account, prepare_conversations
from easyllm.models import hf_module_name, open_source, save_model
from easyllm.models.load import OpenSource
from easyllm.nn.decoder import Decoder
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.train.config import TrainConfig
from easyllm.train.loop import StepReport, mean_loss, run_steps
from easyllm.train.metrics import MetricsLog
from easyllm.train.objectives import LanguageModel
from easyllm.train.optim import MasterOptimizer
from easyllm.train.state import Totals, load_newest, save_state

ADAPTER, MODEL = "adapter", "model"


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Where the result lies and what the run measured."""

    output: Path
    figures: dict[str, Any]


def train(config: TrainConfig, output: Path) -> TrainResult:
    """Runs a training, or goes on with an interrupted one in the same folder.

    Raises:
        OutputError: `output` holds another run, or a finished one.
        ConfigError, DataError, SourceError, CheckpointError: the inputs are wrong.
    """
    check_free(output, config)
    if (output / MANIFEST_FILE).is_file():
        raise OutputError(
            f"{str(output)!r} holds this run, finished; choose another output folder, or remove that one"
        )
    device = pick_device(config.device)
    source = _with_mask(open_source(config.model), config)
    tokenizer = source.tokenizer()
    samples, account = _samples(config, config.data.train, tokenizer, source)
    console().print(f"data: {account.summary()}", soft_wrap=True)
    eval_samples = (
        _samples(config, config.data.eval, tokenizer, source)[0] if config.data.eval else []
    )
    model, optimizer = _build(config, source, device)
    loader = Loader(
        samples,
        batch_size=config.batch_size,
        micro_batch_tokens=config.micro_batch_tokens,
        seed=config.seed,
    )
    total_steps = loader.steps_per_epoch * config.epochs
    total_steps = min(total_steps, config.max_steps or total_steps)
    claim(output, config)  # only now: a mistake in the inputs leaves no folder behind
    torch.manual_seed(config.seed)
    resumed, messages = load_newest(output, optimizer, loader)
    totals = resumed or Totals()
    for message in messages:
        console().print(message)
    if resumed is not None:
        console().print(f"resumed at step {totals.step} of {total_steps}")
    log = MetricsLog(output, after_step=totals.step)
    objective = LanguageModel()

    def evaluate() -> float:
        groups = split_by_tokens(eval_samples, config.micro_batch_tokens)
        return mean_loss(model, objective, (pack(group) for group in groups))

    def after_step(report: StepReport) -> None:
        if report.step % config.log_every == 0 or report.step == total_steps:
            log.write(**report.figures())
        if eval_samples and config.eval_every and report.step % config.eval_every == 0:
            log.write(step=report.step, **{"eval/loss_nats": evaluate()})
        if config.save_every and report.step % config.save_every == 0:
            save_state(output, totals, optimizer, loader, keep_last=config.keep_last)

    run_steps(
        model,
        objective,
        optimizer,
        loader,
        config,
        totals=totals,
        total_steps=total_steps,
        after_step=after_step,
    )
    figures: dict[str, Any] = {
        "steps": totals.step,
        "tokens": totals.tokens,
        "trained_tokens": totals.trained_tokens,
        "data": account.as_dict(),
        "peak_rss_bytes": peak_rss_bytes(),
    }
    if eval_samples:
        figures["eval_loss_nats"] = evaluate()
        log.write(step=totals.step, **{"eval/loss_nats": figures["eval_loss_nats"]})
    log.close()
    _save_result(config, output, model, optimizer, tokenizer)
    manifest = Manifest.create(
        "train",
        config=config.model_dump(mode="json"),
        inputs=_input_hashes(config, source),
        results=figures,
    )
    write_atomic(output / MANIFEST_FILE, manifest.model_dump_json(indent=2) + "\n")
    return TrainResult(output, figures)


def _with_mask(source: OpenSource, config: TrainConfig) -> OpenSource:
    if config.prompt_mask is None:
        return source
    try:
        return replace(source, config=source.config.changed(prompt_mask=config.prompt_mask))
    except ValidationError as error:
        raise ConfigError(f"{config.model}: {error.errors()[0]['msg']}") from None


def _samples(
    config: TrainConfig, files: Sequence[str], tokenizer: Tokenizer, source: OpenSource
) -> tuple[list[Sample], Account]:
    limit = config.data.max_seq_len
    if limit > source.config.max_seq_len:
        raise ConfigError(
            f"data.max_seq_len={limit} is longer than the model's context of {source.config.max_seq_len}; lower it"
        )
    return prepare_conversations(
        chain.from_iterable(read_conversations(Path(file)) for file in files),
        tokenizer,
        max_seq_len=limit,
        overlong=config.data.overlong,
        train_on=config.data.train_on,
        split_turns=config.data.split_turns,
    )


def _build(
    config: TrainConfig, source: OpenSource, device: torch.device
) -> tuple[Decoder, MasterOptimizer]:
    bf16 = config.precision == "bf16" or (config.precision == "auto" and bf16_is_fast(device))
    compute = torch.bfloat16 if bf16 else torch.float32
    if config.adapter is not None:
        model = attach(source.model(compute, device), config.adapter, seed=config.seed)
        return model, MasterOptimizer(adapter_parameters(model), config.optimizer)
    model = source.model(torch.float32, device)
    masters: dict[str, Tensor] = {n: p.detach() for n, p in model.named_parameters()}
    model = model.to(compute).requires_grad_(True)
    return model, MasterOptimizer(dict(model.named_parameters()), config.optimizer, masters)


def _save_result(
    config: TrainConfig,
    output: Path,
    model: Decoder,
    optimizer: MasterOptimizer,
    tokenizer: Tokenizer,
) -> None:
    if config.adapter is not None:
        save_adapter(
            model,
            output / ADAPTER,
            config.adapter,
            module_name=hf_module_name(model),
            base=config.model,
            replace=True,
        )
        return
    for name, value in optimizer.final_state().items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    save_model(model, output / MODEL, tokenizer=tokenizer, replace=True)


def _input_hashes(config: TrainConfig, source: OpenSource) -> dict[str, str]:
    files = {file: hash_file(Path(file)) for file in (*config.data.train, *config.data.eval)}
    return {"model": hash_path(source.path), **files}
