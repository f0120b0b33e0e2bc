"""Proves that a recipe learns the same under every parallel layout as in one process (law 10).

A few steps of the recipe, with small batches of mixed lengths and gradient accumulation, are taken
in one process and then under DDP, ZeRO-1, ZeRO-2, ZeRO-3, FSDP and tensor parallelism. Compared are
the loss and the gradient norm of every step, every tensor of the first step's gradient, and the
weights at the end.
"""

import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from easyllm.core.errors import ConfigError, EasyllmError
from easyllm.core.json_types import JsonObject
from easyllm.core.progress import Progress
from easyllm.core.yaml_text import dump_yaml
from easyllm.nn.config import ModelConfig
from easyllm.parallel.config import FULLY_SHARDED
from easyllm.parallel.launch import launch
from easyllm.parallel.parallel import fully_sharded_reason
from easyllm.parallel.tensor import check_tensor_parallel, tensor_degrees
from easyllm.train.config import TrainConfig
from easyllm.train.deepspeed import ranks_of_file, with_deepspeed
from easyllm.train.division import undivided_reason
from easyllm.train.factories import find_base_model
from easyllm.train.objectives import build_objective
from easyllm.verify.planted import Fault

LOSS_BOUND, GRADIENT_BOUND, WEIGHT_BOUND = 1e-5, 1e-5, 1e-3
"""Largest difference of losses in nats, of gradients (relative to each tensor's largest norm over
the ranks' terms), and of weights (relative to the norm of their change)."""
LAYOUTS = {"DDP": "ddp", "ZeRO-1": "zero1", "ZeRO-2": "zero2", "ZeRO-3": "zero3", "FSDP": "fsdp"}
STEPS, BATCH, SEQUENCE, MICRO, LAYERS = 4, 5, 128, 192, 2
"""Steps, sequences of a step, tokens of a sequence and of a micro-batch, and layers that are kept:
two minutes for SmolLM2 on two cores."""


class RankError(EasyllmError):
    """A rank failed while it trained."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class ParallelFinding:
    """The comparison of one layout with one process.

    Attributes:
        layout: such as `ZeRO-2` or `TP 3`.
        ranks: number of processes; 0 if the layout was not run.
        loss, norm: largest differences of a step; NaN if not run, as are the following.
        gradient, weight: largest relative difference of a tensor.
        weights: difference of all weights together, relative to the norm of their change.
        holds: whether all are within their bounds; None if the layout was not run.
        note: the first tensor that differs, or why the layout was not run.
    """

    layout: str
    ranks: int
    loss: float
    norm: float
    gradient: float
    weight: float
    weights: float
    holds: bool | None
    note: str = ""

    def as_dict(self) -> JsonObject:
        """Returns plain values for JSON; differences that were not measured are null."""
        values = asdict(self)
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}


def verify_parallel(
    config: TrainConfig, *, steps: int = STEPS, layers: int = LAYERS, fault: Fault | None = None
) -> list[ParallelFinding]:
    """Compares a recipe's training under every layout with one process.

    Args:
        config: the recipe.
        steps: number of optimizer steps.
        layers: number of layers of the model that are kept; 0 keeps all.
        fault: a fault to plant in the layouts.

    Returns:
        One finding for each layout.

    Raises:
        ConfigError, DataError, SourceError: the recipe cannot be run.
        RankError: a process failed while it trained.
    """
    if config.deepspeed is not None:  # its batch sizes may be for another number of processes
        world = ranks_of_file(Path(config.deepspeed), config.parallel.tensor)
        config = with_deepspeed(config, world).model_copy(update={"deepspeed": None})
    small = shortened(config, steps)
    model = find_base_model(config).config
    degree, why = _tensor_degree(model, small)
    plans, refused = _plans(small, model)
    found: list[ParallelFinding] = []
    with Progress("verifying", total=len(plans) + 2, unit="layout") as progress:
        if degree == 2:
            plans.append({"name": "TP", "layout": "ddp", "tensor": 2})
        found += _run(small, plans, 2, layers, fault)
        progress.advance(len(plans) + 1)
        if degree > 2:
            plan = {"name": f"TP {degree}", "layout": "ddp", "tensor": degree}
            found += _run(small, [plan], degree, layers, fault)
            progress.advance(1)
    if why:
        refused["TP 2" if degree else "TP"] = why
    n = math.nan
    found += [ParallelFinding(name, 0, n, n, n, n, n, None, why) for name, why in refused.items()]
    return found


def _plans(config: TrainConfig, model: ModelConfig) -> tuple[list[JsonObject], dict[str, str]]:
    """Returns the layouts to run, and why the others cannot train the recipe, by their names.

    Raises:
        ConfigError: none can.
    """
    objective = build_objective(config.objective)
    plans: list[JsonObject] = []
    refused: dict[str, str] = {}
    for name, layout in LAYOUTS.items():
        parallel = config.parallel.model_copy(update={"layout": layout})
        reason = undivided_reason(config.model_copy(update={"parallel": parallel}), objective)
        if layout in FULLY_SHARDED and (kept := fully_sharded_reason(model)):
            reason = f"{layout} does not train {kept}"
        if reason:
            refused[name] = reason
        else:
            plans.append({"name": name, "layout": layout, "tensor": 1})
    if not plans:
        raise ConfigError(next(iter(refused.values())))
    return plans, refused


def shortened(config: TrainConfig, steps: int) -> TrainConfig:
    """Returns a recipe whose steps are few and small, in fp32 on the CPU and without dropout."""
    values = config.model_dump()
    values |= {
        "batch_size": BATCH,
        "batch_tokens": None,
        "micro_batch_tokens": MICRO,
        "max_steps": steps,
        "max_tokens": None,
        "epochs": 1e6,
        "dropout": 0.0,
        "precision": "fp32",
        "compile": False,
        "device": "cpu",
        "samples": None,
        "retention": (),
        "early_stopping": None,
        "keep_best": False,
        "tensorboard": False,
    }
    data = values["data"]
    data["max_seq_len"] = min(SEQUENCE, data["max_seq_len"])
    if "overlong" in data:
        data["overlong"] = "cut"
    if values["adapter"] is not None and "dropout" in values["adapter"]:
        values["adapter"]["dropout"] = 0.0
    return TrainConfig.model_validate(values)


def _tensor_degree(model: ModelConfig, config: TrainConfig) -> tuple[int, str]:
    """Returns the tensor-parallel degree to run (0 for none), and why it is not 2."""
    if config.objective.kind != "language_model":
        return 0, f"objective {config.objective.kind} does not support tensor parallelism"
    if config.quantize is not None:
        return 0, f"weights stored as {config.quantize} are not divided"
    if config.adapter is not None and config.adapter.kind != "lora":
        return 0, f"adapters of kind {config.adapter.kind} are not divided"
    degrees = tensor_degrees(model)
    if 2 in degrees:
        return 2, ""
    try:
        check_tensor_parallel(model, 2)
    except EasyllmError as error:
        runnable = [n for n in degrees if n <= max(4, os.cpu_count() or 1)]
        return (runnable[0] if runnable else 0), str(error)
    raise AssertionError("2 divides the model, so it is one of its degrees")


def _run(
    config: TrainConfig,
    plans: Sequence[JsonObject],
    ranks: int,
    layers: int,
    fault: Fault | None,
) -> Iterator[ParallelFinding]:
    """Trains in `ranks` processes, and yields a finding for each plan."""
    with tempfile.TemporaryDirectory(prefix="easyllm-verify-") as folder:
        (Path(folder) / "recipe.yaml").write_text(dump_yaml(config), encoding="utf-8")
        task = {"plans": list(plans), "layers": layers, "fault": fault}
        (Path(folder) / "task.json").write_text(json.dumps(task), encoding="utf-8")
        command = [sys.executable, "-m", "easyllm.verify.parallel_rank", folder]
        code, failures = launch(command, ranks)
        if code:
            error = RankError(failures[0].message())
            error.exit_code = failures[0].reported_code
            raise error
        for line in (Path(folder) / "findings.jsonl").read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            values["ranks"] = ranks
            yield ParallelFinding(**values)


__all__ = ["ParallelFinding", "RankError", "shortened", "verify_parallel"]
