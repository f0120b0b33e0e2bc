"""A recipe with a DeepSpeed configuration (`deepspeed: ds_config.json`)."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from easyllm.core.config import Config, validate
from easyllm.core.device import bf16_is_fast, pick_device
from easyllm.core.errors import ConfigError
from easyllm.core.json_types import Json, JsonObject
from easyllm.core.progress import console
from easyllm.parallel.deepspeed_config import DeepSpeedSettings, RecipeValues, read_deepspeed
from easyllm.parallel.deepspeed_keys import IGNORED
from easyllm.parallel.deepspeed_values import Fate, ResolvedKey
from easyllm.train.config import TrainConfig
from easyllm.train.optim_config import AdamWConfig, MuonConfig, SGDConfig

STEPS = "gradient_accumulation_steps"
SCALE_KEYS = {
    "initial_scale_power": "initial_power",
    "loss_scale_window": "window",
    "hysteresis": "hysteresis",
    "min_loss_scale": "minimum",
}
LAYOUTS = ("ddp", "zero1", "zero2", "zero3")
OURS: dict[str, tuple[Fate, str]] = {
    "scheduler": ("mapped", "the run sets the learning rate of every step; warm-ups are linear"),
    **{
        name: ("ignored", IGNORED[name])
        for name in ("activation_checkpointing", "compile", "_comment")
    },
}
"""Keys, and sections, that are not simply left to DeepSpeed's engine if it runs the file."""


def with_deepspeed(
    config: TrainConfig, world: int, *, quiet: bool = False, hidden_size: int | None = None
) -> TrainConfig:
    """Returns the recipe with the values of its DeepSpeed configuration, which is printed resolved.

    Args:
        config: the recipe; returned unchanged if it names no configuration.
        world: number of processes.
        quiet: whether nothing is printed.
        hidden_size: width of the model, for `auto` sizes of buckets.

    Raises:
        ConfigError: the configuration cannot be used, or contradicts what the recipe sets; the
            message names everything at once.
    """
    if config.deepspeed is None:
        return config
    path = Path(config.deepspeed)
    settings = read_deepspeed(path, recipe_values(config, world, hidden_size))
    changes = changes_of(settings, config)
    conflicts = [
        f"{key} is {_plain(getattr(config, key))} in the recipe and {_plain(value)} in the file"
        for key, value in changes.items()
        if key in config.model_fields_set and _plain(getattr(config, key)) != _plain(value)
    ]
    if conflicts:
        raise ConfigError(
            f"deepspeed={config.deepspeed} contradicts the recipe: {'; '.join(conflicts)}; remove "
            "one of each, or write auto in the file"
        )
    if not quiet:
        keys = settings.keys if config.backend == "torch" else engine_keys(settings.keys)
        for line in table(keys):
            console().print(line, soft_wrap=True, markup=False)
    return validate(TrainConfig, config.model_dump() | changes, source=str(path))


def recipe_values(config: TrainConfig, world: int, hidden_size: int | None = None) -> RecipeValues:
    """Returns the values of a recipe that `auto` stands for."""
    optimizer, schedule = config.optimizer, config.schedule
    adamw = optimizer if isinstance(optimizer, AdamWConfig) else AdamWConfig()
    ranks = max(1, world // config.parallel.tensor)
    precision = config.precision.removesuffix("_autocast")
    if precision == "auto":
        precision = "bf16" if bf16_is_fast(pick_device(config.device)) else "fp32"
    batch_size = config.batch_size or ranks
    return RecipeValues(
        world=ranks,
        batch_size=batch_size,
        micro_batch=max(1, min(batch_size // ranks, _rows(config))),
        clip_norm=config.clip_norm,
        learning_rate=optimizer.learning_rate,
        betas=adamw.betas,
        eps=adamw.eps,
        weight_decay=optimizer.weight_decay,
        warmup_steps=schedule.warmup_steps,
        total_steps=config.max_steps,
        hidden_size=hidden_size,
        precision=precision,
    )


def _rows(config: TrainConfig) -> int:
    """Returns the sequences of maximum length that fit a micro-batch."""
    return max(1, config.micro_batch_tokens // config.data.max_seq_len)


def ranks_of_file(path: Path, tensor: int = 1) -> int:
    """Returns the number of processes for which a file's batch sizes are consistent, or 2."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        micro, steps = values["train_micro_batch_size_per_gpu"], values.get(STEPS, 1)
        return max(1, int(values["train_batch_size"]) // (int(micro) * int(steps))) * tensor
    except (OSError, ValueError, KeyError, TypeError):
        return 2 * tensor  # `with_deepspeed` reports what is wrong with the file


def changes_of(settings: DeepSpeedSettings, config: TrainConfig) -> JsonObject:
    """Returns the keys of a recipe that a configuration sets, with their values."""
    changes: JsonObject = {
        "batch_size": settings.batch_size,
        "batch_tokens": None,
        "clip_norm": settings.clip_norm,
        "precision": settings.precision,
        "parallel": config.parallel.model_dump()
        | {
            "layout": LAYOUTS[settings.stage],
            "tensor": max(settings.tensor, config.parallel.tensor),
            "bucket_mb": settings.bucket_elements * 4 / 2**20,
            "offload": settings.offload,
        },
    }
    if settings.loss_scale:
        changes["loss_scale"] = config.loss_scale.model_dump() | {
            SCALE_KEYS[name]: value for name, value in settings.loss_scale.items()
        }
    if config.parallel.layout == "fsdp" and settings.stage == 3:
        changes["parallel"]["layout"] = "fsdp"
    if settings.optimizer is not None:
        changes["optimizer"] = _optimizer(*settings.optimizer, config)
    if settings.scheduler is not None:
        changes["schedule"] = _schedule(*settings.scheduler, config)
        peak = settings.scheduler[1].get("warmup_max_lr")
        if peak is not None:
            optimizer = changes.get("optimizer", config.optimizer.model_dump())
            changes["optimizer"] = optimizer | {"learning_rate": peak}
    for key in ("parallel", "optimizer", "schedule", "loss_scale"):
        if key in changes:
            filled = TrainConfig.model_validate(config.model_dump() | {key: changes[key]})
            changes[key] = getattr(filled, key).model_dump()
    return changes


def _optimizer(kind: str, params: Mapping[str, Any], config: TrainConfig) -> JsonObject:
    names = {"lr": "learning_rate"}
    renamed = {names.get(name, name): value for name, value in params.items()}
    base = config.optimizer.model_dump() if config.optimizer.kind == kind else {"kind": kind}
    kinds: dict[str, type[Config]] = {"adamw": AdamWConfig, "sgd": SGDConfig, "muon": MuonConfig}
    known = kinds[kind].model_fields
    wrong = [name for name in renamed if name not in known]
    if wrong:
        raise ConfigError(
            f"optimizer.params.{wrong[0]} is not a parameter of {kind}; remove it from the "
            "DeepSpeed configuration"
        )
    return base | renamed


def _schedule(kind: str, params: Mapping[str, Any], config: TrainConfig) -> JsonObject:
    warmup = params.get("warmup_num_steps")
    found: JsonObject = {"kind": kind}
    if warmup is not None:
        found["warmup_steps"] = int(warmup)
    elif config.schedule.kind == kind:
        found = config.schedule.model_dump()
    else:
        found["warmup_ratio"] = config.schedule.warmup_ratio
    if "cos_min_ratio" in params:
        found["floor"] = params["cos_min_ratio"]
    return found


def engine_keys(keys: Iterable[ResolvedKey]) -> tuple[ResolvedKey, ...]:
    """Returns what becomes of each key if DeepSpeed's own engine runs the file."""
    found: list[ResolvedKey] = []
    for each in keys:
        section = each.key.partition(".")[0]
        if section in OURS:
            fate, note = OURS[section]
            found.append(replace(each, fate=fate, note=note))
        elif each.key == "zero_optimization.stage" or each.fate == "ignored":
            found.append(replace(each, fate="honoured", note=""))
        else:
            found.append(each)
    return tuple(found)


def table(keys: Sequence[ResolvedKey]) -> list[str]:
    """Returns a resolved configuration, one line a key."""
    width = max(len(each.key) for each in keys)
    return [
        f"{each.key:<{width}}  {each.fate:<8}  {each.value}"
        + (f"  ({each.note})" * bool(each.note))
        for each in keys
    ]


def _plain(value: object) -> Json:
    dump = getattr(value, "model_dump", None)
    plain: Json = dump() if dump is not None else value
    return plain


__all__ = ["changes_of", "ranks_of_file", "recipe_values", "table", "with_deepspeed"]
