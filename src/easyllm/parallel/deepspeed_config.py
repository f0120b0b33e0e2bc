"""Reads a DeepSpeed configuration (`ds_config.json`) and says what becomes of each of its keys.

    honoured   the run does what the key says
    mapped     the run does the same by other means (the note says by which)
    ignored    the key has no effect here (the note says why that changes no result)
    rejected   an error: the key would change the result, or is not a key of DeepSpeed

`auto` takes the recipe's value, as in Hugging Face's Trainer. Numbers may be strings or floats
(`5e8`), and the older names `cpu_offload` and `X` for `stage3_X` are read. All conflicts are
reported together. DeepSpeed itself ignores unknown top-level keys, treats stage "auto" as 0, builds
AdamW for "Adam", and clips at 1.0 if `gradient_clipping` is absent (0.19.8); here the first is an
error, and the notes name the others.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from easyllm.core.errors import ConfigError, read_failure, suggest
from easyllm.core.json_types import JsonMapping
from easyllm.parallel.deepspeed_keys import (
    IGNORED,
    NESTED,
    OPTIMIZERS,
    REJECTED,
    SCHEDULERS,
    ZERO_KEYS,
)
from easyllm.parallel.deepspeed_values import (
    DeepSpeedSettings,
    Fate,
    RecipeValues,
    ResolvedKey,
)

AUTO = "auto"
SCALE_KEYS = ("initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale")


def read_deepspeed(source: Path | JsonMapping, recipe: RecipeValues) -> DeepSpeedSettings:
    """Resolves a configuration.

    Args:
        source: the file, or its contents.
        recipe: the values of the recipe.

    Raises:
        ConfigError: the file cannot be read, or keys are unknown, rejected or in conflict; the
            message names all of them.
    """
    if isinstance(source, Path):
        try:
            source = json.loads(source.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = read_failure(error)
            raise ConfigError(
                f"the DeepSpeed configuration {str(source)!r} cannot be read as JSON ({reason}); "
                "give the path of a ds_config.json"
            ) from None
    if not isinstance(source, Mapping):
        raise ConfigError("a DeepSpeed configuration is a JSON object; give a ds_config.json")
    return _Reader(source, recipe).settings()


class _Reader:
    """Reads one configuration, and collects all problems before it reports them."""

    def __init__(self, values: JsonMapping, recipe: RecipeValues) -> None:
        self.values, self.recipe = dict(values), recipe
        self.keys: list[ResolvedKey] = []
        self.problems: list[str] = []

    def settings(self) -> DeepSpeedSettings:
        zero = self._section("zero_optimization")
        stage = self._stage(zero)
        batch, micro, accumulation = self._batch_sizes()
        precision, scale = self._precision()
        settings = DeepSpeedSettings(
            stage=stage,
            batch_size=batch,
            micro_batch=micro,
            accumulation=accumulation,
            clip_norm=self._clip_norm(),
            precision=precision,
            loss_scale=scale,
            bucket_elements=self._bucket(zero),
            offload=self._offload(zero, stage),
            tensor=self._tensor(),
            optimizer=self._optimizer(),
            scheduler=self._scheduler(),
        )
        self._gathering(zero, stage)
        self._others(zero)
        if self.problems:
            raise ConfigError("the DeepSpeed configuration " + "; ".join(self.problems))
        ordered = sorted(self.keys, key=lambda each: each.key)
        return DeepSpeedSettings(
            **{n: getattr(settings, n) for n in DeepSpeedSettings.__slots__ if n != "keys"},
            keys=tuple(ordered),
        )

    def note(self, key: str, value: object, fate: Fate, note: str = "") -> None:
        self.keys.append(ResolvedKey(key, value, fate, note))

    def _section(self, key: str) -> dict[str, Any]:
        found = self.values.pop(key, {})
        if isinstance(found, Mapping):
            return dict(found)
        self.problems.append(f"has {key}={found!r}, but it is an object")
        return {}

    def _number(self, key: str, value: object) -> float:
        """Returns a number that may be a string."""
        try:
            if isinstance(value, bool):
                raise ValueError
            return float(str(value))
        except ValueError:
            self.problems.append(f"has {key}={value!r}, which is not a number")
            return 1.0

    def _whole(self, key: str, value: object) -> int:
        """Returns a whole number that may be a string, or a float such as 5e8."""
        number = self._number(key, value)
        if number != int(number):
            self.problems.append(f"has {key}={value!r}, which is not a whole number")
        return int(number)

    def _stage(self, zero: dict[str, Any]) -> int:
        value = zero.pop("stage", 0)
        key = "zero_optimization.stage"
        if value == AUTO:
            self.problems.append(
                f"has {key}='auto', which DeepSpeed reads as 0; write 0, 1, 2 or 3"
            )
            return 0
        stage = self._whole(key, value)
        if stage not in (0, 1, 2, 3):
            self.problems.append(f"has {key}={stage}; write 0, 1, 2 or 3")
            return 0
        engine = "PyTorch's FSDP2 (layout zero3)" if stage == 3 else ""
        self.note(key, stage, "mapped" if engine else "honoured", engine)
        return stage

    def _batch_sizes(self) -> tuple[int, int, int]:
        recipe = self.recipe
        names = ("train_batch_size", "train_micro_batch_size_per_gpu")
        found: dict[str, int] = {}
        for key in (*names, "gradient_accumulation_steps"):
            value = self.values.pop(key, AUTO)
            if value != AUTO:
                found[key] = max(1, number := self._whole(key, value))
                if number < 1:
                    self.problems.append(f"has {key}={number}, which must be at least 1")
        micro = found.get(names[1])
        accumulation = found.get("gradient_accumulation_steps")
        batch = found.get(names[0])
        if batch is None:
            batch = recipe.batch_size
            if micro is not None and accumulation is not None:
                batch = micro * accumulation * recipe.world
        if micro is None and accumulation is not None:
            micro = max(1, batch // (accumulation * recipe.world))
        micro = micro or min(recipe.micro_batch, max(1, batch // recipe.world))
        if accumulation is None:
            accumulation = max(1, batch // (micro * recipe.world))
        if micro * accumulation * recipe.world != batch:
            self.problems.append(
                f"says train_batch_size={batch}, but {recipe.world} ranks x micro-batches of "
                f"{micro} x {accumulation} accumulation steps are "
                f"{micro * accumulation * recipe.world}"
            )
        self.note(names[0], batch, "honoured")
        self.note(names[1], micro, "mapped", "micro-batches are packed by tokens")
        self.note("gradient_accumulation_steps", accumulation, "mapped", "as many as tokens need")
        return batch, micro, accumulation

    def _clip_norm(self) -> float | None:
        key = "gradient_clipping"
        if key not in self.values:
            self.note(key, self.recipe.clip_norm, "mapped", "absent: the recipe's (DeepSpeed: 1.0)")
            return self.recipe.clip_norm
        value = self.values.pop(key)
        clip = self.recipe.clip_norm if value == AUTO else self._number(key, value)
        self.note(key, clip, "honoured")
        return clip or None

    def _precision(self) -> tuple[str, dict[str, float]]:
        enabled, disabled, scale = list[str](), set[str](), dict[str, float]()
        for name in ("bf16", "bfloat16", "fp16"):
            section = self._section(name)
            written = set(section)
            value = section.pop("enabled", bool(section))
            kind = "fp16" if name == "fp16" else "bf16"
            if value == AUTO:
                value = self.recipe.precision == kind
            if value in (True, "true", "True", 1):
                enabled.append(kind)
                self.note(f"{name}.enabled", True, "honoured")
            elif value is not True and "enabled" in written:
                disabled.add(kind)
            if kind == "fp16":
                self._static_scale(section)
                for key in SCALE_KEYS:
                    scale |= self._scale(section, key)
            self._leftover(section, name if name != "bfloat16" else "bf16")
        if len(enabled) > 1:
            self.problems.append("enables both bf16 and fp16; enable one")
        kept = "fp32" if self.recipe.precision in disabled else self.recipe.precision
        return (enabled[0] if enabled else kept), scale

    def _static_scale(self, section: dict[str, Any]) -> None:
        value = section.pop("loss_scale", 0)
        if value not in (0, AUTO) and self._number("fp16.loss_scale", value):
            self.problems.append(f"has a static fp16.loss_scale={value}; write 0 (dynamic)")

    def _scale(self, section: dict[str, Any], key: str) -> dict[str, float]:
        if key not in section:
            return {}
        value = self._number(f"fp16.{key}", section.pop(key))
        self.note(f"fp16.{key}", value, "honoured")
        return {key: value}

    def _bucket(self, zero: dict[str, Any]) -> int:
        key, width = "zero_optimization.reduce_bucket_size", self.recipe.hidden_size
        value = zero.pop("reduce_bucket_size", 5e8)
        if value == AUTO:
            value = 5e8 if width is None else width * width
        elements = self._whole(key, value)
        self.note(key, elements, "honoured", "in elements; a bucket holds whole parameters")
        return elements

    def _offload(self, zero: dict[str, Any], stage: int) -> bool:
        offload = False
        for name in ("offload_optimizer", "offload_param", "cpu_offload"):
            if name not in zero:
                continue
            section = zero.pop(name)
            device = "cpu" if section is True else "none"
            if isinstance(section, Mapping):
                device = str(section.get("device", "none"))
            key = f"zero_optimization.{name}"
            if device in ("none", "None"):
                self.note(key, "none", "honoured")
            elif device == "nvme":
                self.problems.append(
                    f"offloads to NVMe ({key}), which is not supported; write device=cpu"
                )
            elif stage < 3:
                self.note(key, device, "ignored", "below stage 3 the state stays on the device")
            else:
                self.note(key, device, "mapped", "FSDP2's CPU offload of weights and state")
                offload = True
        return offload

    def _tensor(self) -> int:
        section = self._section("tensor_parallel")
        value = section.pop("autotp_size", 1)
        degree = self._whole("tensor_parallel.autotp_size", value)
        if degree > 1:
            self.note("tensor_parallel.autotp_size", degree, "honoured")
        self._leftover(section, "tensor_parallel")
        return max(1, degree)

    def _optimizer(self) -> tuple[str, dict[str, Any]] | None:
        section = self._section("optimizer")
        if not section:
            return None
        name = str(section.pop("type", ""))
        params = dict(section.pop("params", {}))
        self._leftover(section, "optimizer")
        kind = OPTIMIZERS.get(name.lower())
        if kind is None:
            self.problems.append(
                f"has optimizer.type={name!r}, which is not supported; write AdamW, Adam, SGD or "
                "Muon, or remove it to use the recipe's"
            )
            return None
        adam = name.lower() == "adam"
        if adam and str(params.pop("adam_w_mode", True)).lower() == "false":
            self.problems.append("has optimizer.params.adam_w_mode=false; write weight_decay=0")
        note = "DeepSpeed builds AdamW for Adam, and so does this" if adam else ""
        self.note("optimizer.type", name, "honoured", note)
        recipe = self.recipe
        defaults = {
            "lr": recipe.learning_rate,
            "betas": list(recipe.betas),
            "eps": recipe.eps,
            "weight_decay": recipe.weight_decay,
            "momentum": 0.0,
        }
        for unused in ("torch_adam", "bias_correction", "fused"):
            params.pop(unused, None)
        return kind, self._resolved("optimizer", params, defaults)

    def _scheduler(self) -> tuple[str, dict[str, Any]] | None:
        section = self._section("scheduler")
        if not section:
            return None
        name = str(section.pop("type", ""))
        params = dict(section.pop("params", {}))
        self._leftover(section, "scheduler")
        kind = SCHEDULERS.get(name.lower())
        if kind is None:
            self.problems.append(
                f"has scheduler.type={name!r}, which is not supported; write "
                f"{', '.join(('WarmupLR', 'WarmupDecayLR', 'WarmupCosineLR'))}, or remove it"
            )
            return None
        if str(params.get("warmup_type", "log")) == "log":
            note = "the warm-up is linear; DeepSpeed's default is logarithmic"
            self.note("scheduler.type", name, "mapped", note)
        else:
            self.note("scheduler.type", name, "honoured")
        params.pop("warmup_type", None)
        recipe = self.recipe
        defaults = {
            "warmup_min_lr": 0.0,
            "warmup_max_lr": recipe.learning_rate,
            "warmup_num_steps": recipe.warmup_steps,
            "total_num_steps": recipe.total_steps,
            "warmup_min_ratio": 0.0,
            "cos_min_ratio": 0.0,
        }
        found = self._resolved("scheduler", params, defaults)
        for key in ("warmup_min_lr", "warmup_min_ratio"):
            if found.get(key):
                self.problems.append(f"starts the warm-up at {found[key]}; write {key}=0")
        return kind, found

    def _resolved(
        self, section: str, params: dict[str, Any], defaults: Mapping[str, Any]
    ) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in params.items():
            key = f"{section}.params.{name}"
            if key in IGNORED:
                self.note(key, value, "ignored", IGNORED[key])
                continue
            if name not in defaults:
                self.problems.append(f"has an unknown key {key}{suggest(name, defaults)}")
                continue
            if value == AUTO:
                value = defaults[name]
            elif name == "betas":
                value = [self._number(key, each) for each in value]
            else:
                value = self._number(key, value)
            found[name] = value
            self.note(key, value, "honoured")
        return found

    def _gathering(self, zero: dict[str, Any], stage: int) -> None:
        name = "stage3_gather_16bit_weights_on_model_save"
        zero.pop("zero_hpz_partition_size", None)
        for key in (name, "gather_16bit_weights_on_model_save"):
            if key in zero:
                value = zero.pop(key)
                note = "the result is always gathered, in fp32"
                if stage == 3 and value is False:
                    note += "; DeepSpeed would save empty tensors"
                self.note(f"zero_optimization.{key}", value, "mapped", note)

    def _leftover(self, section: dict[str, Any], prefix: str) -> None:
        """Classifies what is left of a section."""
        for name, value in section.items():
            self._classify(f"{prefix}.{name}", value)

    def _others(self, zero: dict[str, Any]) -> None:
        for name, value in zero.items():
            full = name if f"zero_optimization.{name}" in IGNORED else f"stage3_{name}"
            self._classify(f"zero_optimization.{full}", value, f"zero_optimization.{name}")
        for name, value in self.values.items():
            self._classify(name, value)

    def _classify(self, key: str, value: object, written: str = "") -> None:
        written = written or key
        if key in IGNORED:
            if value == AUTO and self.recipe.hidden_size is not None:
                value = _auto_size(key, self.recipe.hidden_size, value)
            self.note(written, value, "ignored", IGNORED[key])
        elif key in REJECTED and _is_off(value):
            self.note(written, "off", "ignored", "not enabled")
        elif key in REJECTED:
            self.problems.append(f"has {written}, which is not supported: {REJECTED[key]}")
        else:
            known = [*IGNORED, *REJECTED, *NESTED, *(f"zero_optimization.{k}" for k in ZERO_KEYS)]
            known += ["gradient_clipping", "train_batch_size", "gradient_accumulation_steps"]
            self.problems.append(f"has an unknown key {written}{suggest(written, known)}")


def _is_off(section: object) -> bool:
    """Whether a section says that it is not in use; `auto` leaves that to the recipe."""
    return isinstance(section, Mapping) and section.get("enabled") in (False, "false", AUTO)


def _auto_size(key: str, hidden: int, value: object) -> object:
    """Returns what Hugging Face's Trainer puts for `auto` sizes of stage 3."""
    sizes = {"prefetch_bucket_size": int(0.9 * hidden * hidden), "threshold": 10 * hidden}
    return next((size for part, size in sizes.items() if key.endswith(part)), value)


__all__ = ["DeepSpeedSettings", "RecipeValues", "ResolvedKey", "read_deepspeed"]
