"""One rank of `easyllm verify --parallel`: trains under every layout and compares on rank 0.

python -m easyllm.verify.parallel_rank FOLDER      started by `verify.parallel`
"""

import io
import json
import math
import sys
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import easyllm.rl.register  # noqa: F401 - the kinds of recipes for reinforcement learning
from easyllm.adapters import StepInfo
from easyllm.core.config import validate
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.core.yaml_text import read_yaml
from easyllm.nn.decoder import Decoder
from easyllm.parallel.config import ParallelConfig
from easyllm.parallel.failures import record_error
from easyllm.parallel.mesh import Mesh, join, leave
from easyllm.train.config import TrainConfig
from easyllm.train.factories import BaseModelSource, build_model, build_reference
from easyllm.train.loop import take_step
from easyllm.train.run import build_run, prepare
from easyllm.train.training_run import Callback, Run
from easyllm.verify.parallel import GRADIENT_BOUND, LOSS_BOUND, WEIGHT_BOUND
from easyllm.verify.planted import Fault, plant

PATIENCE_S = 86400.0
"""Timeout of collectives: the other ranks wait while rank 0 trains alone."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What a few steps have computed.

    Attributes:
        losses, norms: of each step.
        gradients: of the first step, by name, full tensors.
        weights: the trained weights at the end, by name, full tensors.
        start: the same before the first step.
    """

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    start: dict[str, Tensor]


class _Gradients(Callback):
    """Keeps the gradients of the first step."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def after_backward(self, run: Run, info: StepInfo) -> None:
        if info.step == 0:
            self.found = _full(run, run.optimizer.gradients())


def train_steps(
    config: TrainConfig, mesh: Mesh | None, layers: int, fault: Fault | None = None
) -> Trace:
    """Takes all steps of a recipe in this process, or as a rank of a mesh."""
    with redirect_stderr(io.StringIO()):  # the plan is that of a shortened recipe
        ready = prepare(config, mesh, flops_per_s=1.0)
    ready = replace(ready, origin=_cut(ready.origin, layers))
    trained = build_model(config, ready.origin, ready.objective, ready.device, mesh=mesh)
    if ready.objective.needs_reference:
        ready.objective.reference = build_reference(config, ready.origin, ready.objective, trained)
    if fault is not None and trained.parallel is not None:
        plant(fault, trained.model, trained.parallel)
    gradients = _Gradients()
    run = replace(build_run(config, Path(), ready, trained), callbacks=(gradients,))
    start = _full(run, run.optimizer.masters)
    run.model.train()
    reports = [take_step(run) for _ in range(run.total_steps)]
    weights = _full(run, run.optimizer.masters)
    losses = [report.loss_nats for report in reports]
    return Trace(losses, [r.grad_norm for r in reports], gradients.found, weights, start)


def compare(name: str, one: Trace, other: Trace) -> JsonObject:
    """Returns the fields of a `ParallelFinding`, without the number of ranks."""
    loss = _largest(one.losses, other.losses)
    norm = _largest(one.norms, other.norms, relative=True)
    gradient, where = _furthest(one.gradients, other.gradients, one.gradients)
    changes = {n: one.weights[n] - one.start[n] for n in one.weights}
    weight, where_weight = _furthest(one.weights, other.weights, changes)
    gaps = [float((one.weights[n] - other.weights[n]).norm()) for n in one.weights]
    total = math.hypot(*gaps) / math.hypot(*(float(c.norm()) for c in changes.values()))
    note = ""
    if not gradient <= GRADIENT_BOUND:
        note = f"gradient of {where}"
    elif not weight <= WEIGHT_BOUND:
        note = f"weight {where_weight}"
    elif not loss <= LOSS_BOUND:
        note = "loss"
    holds = not note and norm <= GRADIENT_BOUND
    return {
        "layout": name,
        "loss": loss,
        "norm": norm,
        "gradient": gradient,
        "weight": weight,
        "weights": total,
        "holds": holds,
        "note": note or ("" if holds else "gradient norm"),
    }


def _largest(mine: list[float], theirs: list[float], *, relative: bool = False) -> float:
    pairs = zip(mine, theirs, strict=True)
    return max(abs(a - b) / (abs(a) if relative and a else 1.0) for a, b in pairs)


def _furthest(
    mine: dict[str, Tensor], theirs: dict[str, Tensor], scale: dict[str, Tensor]
) -> tuple[float, str]:
    """Returns the largest relative difference of a tensor, and the first tensor beyond bounds.

    The difference is relative to the norm of the tensor in `scale`, but not to less than a
    thousandth of the largest one: rounding of sums over the batch does not shrink with them.
    """
    norms = {name: float(scale[name].double().norm()) for name in mine}
    least = 1e-3 * max(norms.values(), default=1.0) or 1.0
    worst, where = 0.0, ""
    for name, tensor in mine.items():
        if name not in theirs:
            return math.inf, name
        gap = float((tensor.double() - theirs[name].double()).norm()) / max(norms[name], least)
        if not gap <= worst:
            worst, where = gap, name
    return worst, where


def _full(run: Run, parts: JsonMapping) -> dict[str, Tensor]:
    """Returns full tensors of this rank's parts; a tensor that no rank has is left out."""
    if run.parallel is None:
        return {name: part.detach().clone() for name, part in parts.items()}
    found: dict[str, Tensor] = {}
    held = run.parallel.any_of(name in parts for name in run.parallel.local)
    for is_held, (name, local) in zip(held, run.parallel.local.items(), strict=True):
        if not is_held:
            continue
        part = parts.get(name)
        part = torch.zeros_like(local) if part is None else part
        found[name] = run.parallel.full(name, part.detach())
    return found


def _cut(origin: BaseModelSource, layers: int) -> BaseModelSource:
    """Returns a source whose models have their first layers only."""
    if not 0 < layers < origin.config.num_layers:
        return origin
    config = origin.config.changed(layers=origin.config.layers[:layers])

    def build(dtype: torch.dtype, device: torch.device) -> Decoder:
        model = origin.build(dtype, device)
        model.layers, model.config = model.layers[:layers], config
        return model

    return replace(origin, config=config, build=build)


def main(folder: Path) -> None:
    """Runs the task in `folder`; rank 0 writes `findings.jsonl`."""
    torch.set_num_threads(1)
    recipe = validate(TrainConfig, read_yaml(folder / "recipe.yaml"), source="recipe.yaml")
    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    mesh = join(ParallelConfig(timeout_s=PATIENCE_S))
    # the other ranks need not train alone, too: they would only take processor time from rank 0
    one = train_steps(recipe, None, task["layers"]) if mesh.is_first else None
    lines: list[str] = []
    for plan in task["plans"]:
        parallel = ParallelConfig(layout=plan["layout"], tensor=plan["tensor"])
        mesh = join(parallel)
        config = recipe.model_copy(update={"parallel": parallel})
        other = train_steps(config, mesh, task["layers"], task["fault"])
        if one is not None:
            lines.append(json.dumps(compare(plan["name"], one, other)) + "\n")
    if mesh.is_first:
        (folder / "findings.jsonl").write_text("".join(lines), encoding="utf-8")
    leave()


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except Exception as error:
        if not record_error(error):
            raise
        sys.exit(1)
