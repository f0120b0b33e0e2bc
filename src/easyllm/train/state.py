"""Training checkpoints: everything needed for a bitwise-exact resume, without pickle.

checkpoints/step-000100/state.safetensors   master weights, moments, RNG states
checkpoints/step-000100/state.json          progress, loader position, hashes of the run's inputs
checkpoints/best/                           the checkpoint with the lowest evaluation loss, if kept

A run divided among ranks writes the parts of each rank instead (`train.sharded_state`).
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from easyllm.adapters import AdapterSet
from easyllm.checkpoint.stream import TensorFile, Under, stream_tensors
from easyllm.core.atomic import atomic_directory, write_json
from easyllm.core.errors import CheckpointError
from easyllm.parallel.parallel import Parallel
from easyllm.train.loss_scaler import LossScaler
from easyllm.train.objectives import Objective
from easyllm.train.optim import MasterOptimizer
from easyllm.train.progress import TrainProgress
from easyllm.train.sharded_state import (
    STATE,
    TENSORS,
    Layout,
    StoredParts,
    own_parts,
    shared_directory,
    write_parts,
)

if TYPE_CHECKING:
    from easyllm.core.json_types import JsonObject

FOLDER, BEST = "checkpoints", "best"
SCALER = "loss_scaler"


@dataclass(frozen=True, slots=True)
class RunState:
    """The objects of a run whose state a checkpoint saves and restores.

    Attributes:
        optimizer: master weights and optimizer states.
        loader: the data loader, whose position is saved.
        progress: the run's counters and evaluations.
        identity: hashes of the run's model, tokenizer and data; a checkpoint with other hashes is
            rejected.
        adapters: the adapter being trained, whose own state is saved too.
        scaler: the loss scaler, for fp16.
        objective: the objective, whose own state is saved too.
        parallel: the ranks that the optimizer's state is divided among.
    """

    optimizer: MasterOptimizer
    loader: Any
    progress: TrainProgress
    identity: dict[str, str]
    adapters: AdapterSet | None = None
    scaler: LossScaler | None = None
    objective: Objective | None = None
    parallel: Parallel | None = None


def save_state(folder: Path, state: RunState) -> None:
    """Writes a checkpoint atomically; in a divided run, all ranks must call it."""
    values = state_values(state)
    tensors, layout = state_tensors(state)
    if state.parallel is not None:
        with shared_directory(folder, state.parallel) as work:
            write_parts(work, tensors, layout, values, state.parallel, state.optimizer.release)
        return
    with atomic_directory(folder, replace=True) as work:
        stream_tensors(work / TENSORS, tensors, state.optimizer.release)
        write_json(work / STATE, values)


def state_tensors(state: RunState) -> tuple[dict[str, Tensor], Layout]:
    """Returns the tensors that this process writes, and which pieces they are in a divided run."""
    held, parallel = state.optimizer.tensors(), state.parallel
    if parallel is None:
        tensors = {f"optimizer.{name}": tensor for name, tensor in held.items()}
        return tensors | _other_tensors(state), {}
    parts, layout = own_parts(held, parallel)
    return parts | _other_tensors(state, shared=parallel.is_first), layout


def _other_tensors(state: RunState, *, shared: bool = True) -> dict[str, Tensor]:
    """Returns the random state of this process and, if `shared`, what all ranks have alike."""
    tensors: dict[str, Tensor] = {}
    if state.adapters is not None and shared:
        tensors |= {f"adapter.{name}": t for name, t in state.adapters.state().items()}
    if state.objective is not None and shared:
        tensors |= {f"objective.{name}": t for name, t in state.objective.tensors().items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if state.optimizer.device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(state.optimizer.device)
    return tensors


def state_values(state: RunState) -> "JsonObject":
    """Returns what `state.json` holds: counters, the loader's position and hashes of the inputs."""
    totals, extra = state.progress.to_json()
    if state.scaler is not None:
        extra[SCALER] = state.scaler.state()
    return {
        "totals": totals,
        "loader": asdict(state.loader.state),
        "identity": state.identity,
        "extra": extra,
    }


def save_step(run: Path, state: RunState, *, keep_last: int) -> None:
    """Writes the checkpoint of the current step and prunes old ones.

    Removes all but the newest `keep_last` checkpoints. Also removes those of later steps, which
    were damaged and skipped when the run resumed.
    """
    here = step_folder(run, state.progress.step)
    save_state(here, state)
    if state.parallel is None or state.parallel.is_first:
        prune(run, here, keep_last=keep_last)


def step_folder(run: Path, step: int) -> Path:
    """Returns the folder of a step's checkpoint."""
    return run / FOLDER / f"step-{step:06d}"


def prune(run: Path, here: Path, *, keep_last: int) -> None:
    """Removes all checkpoints of steps but `here` and the `keep_last - 1` before it."""
    found = checkpoints(run)
    place = found.index(here) + 1
    for old in [*found[: max(0, place - keep_last)], *found[place:]]:
        shutil.rmtree(old)


def checkpoints(run: Path) -> list[Path]:
    """Returns the step checkpoints of a run, oldest first; partially written ones are excluded."""
    found = [p for p in (run / FOLDER).glob("step-*") if p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def load_newest(run: Path, state: RunState) -> tuple[bool, list[str]]:
    """Restores the newest checkpoint that is not damaged.

    Returns:
        Whether there was one, and a message for each damaged checkpoint that was skipped.

    Raises:
        CheckpointError: it belongs to another model, tokenizer or data.
    """
    skipped = []
    for folder in reversed(checkpoints(run)):
        try:
            load_state(folder, state)
        except (_Damaged, OSError) as error:
            skipped.append(f"checkpoint {folder.name} is damaged and was skipped ({error})")
            continue
        return True, skipped
    return False, skipped


def load_state(folder: Path, state: RunState) -> None:
    """Restores one checkpoint into the objects of a run.

    Raises:
        CheckpointError: it is damaged, or belongs to another model, tokenizer or data.
    """
    try:
        noted: JsonObject = json.loads((folder / STATE).read_text("utf-8"))
        tensors = _stored_tensors(folder, noted, state)
        identity, extra = dict(noted["identity"]), dict(noted["extra"])
        progress = TrainProgress.from_json(noted["totals"], extra)
        position = type(state.loader.state)(**noted["loader"])
    except (CheckpointError, OSError, ValueError, KeyError, TypeError) as error:
        raise _Damaged(str(error)) from None
    for name, mine in state.identity.items():
        if identity.get(name) != mine:
            raise CheckpointError(
                f"checkpoint {folder} was created with another {name} (hash "
                f"{str(identity.get(name))[:12]} there, {mine[:12]} now); restore the old one, or "
                "choose another output folder"
            )
    state.optimizer.load_tensors(Under(tensors, "optimizer."))
    if state.parallel is not None:
        state.parallel.refresh()
    if state.adapters is not None:
        state.adapters.load_state(dict(Under(tensors, "adapter.")))
    if state.objective is not None:
        state.objective.load_tensors(Under(tensors, "objective."))
    state.loader.state = position
    state.progress.restore(progress)
    if state.scaler is not None:
        state.scaler.load_state(extra.get(SCALER))
    if "random.cpu" in tensors:  # absent for a rank that the saved run did not have
        torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and state.optimizer.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"], state.optimizer.device)


def _stored_tensors(folder: Path, noted: "JsonObject", state: RunState) -> Mapping[str, Tensor]:
    """Returns the stored tensors, in the parts that this process holds."""
    if noted.get("layout") is None and state.parallel is None:
        return TensorFile(folder / TENSORS)
    return StoredParts(folder, noted, state.parallel)


class _Damaged(CheckpointError):
    """A checkpoint that cannot be read."""
