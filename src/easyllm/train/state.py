"""Checkpoints of a running training: everything needed to go on bit by bit, and no pickle.

checkpoints/step-000100/state.safetensors   masters, moments, random states
checkpoints/step-000100/state.json          step, loader position, totals
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from easyllm.checkpoint.store import read_tensors, write_tensors
from easyllm.core.atomic import atomic_directory, write_json
from easyllm.core.errors import CheckpointError
from easyllm.data.loader import Loader, LoaderState
from easyllm.train.optim import MasterOptimizer

FOLDER = "checkpoints"


@dataclass(slots=True)
class Totals:
    """Counted since the first step."""

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0


def save_state(
    run: Path, totals: Totals, optimizer: MasterOptimizer, loader: Loader, *, keep_last: int
) -> None:
    """Writes a checkpoint atomically and removes the oldest beyond `keep_last`."""
    folder = run / FOLDER / f"step-{totals.step:06d}"
    tensors = {f"optimizer.{name}": t for name, t in optimizer.tensors().items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    with atomic_directory(folder, replace=True) as work:
        write_tensors(work / "state.safetensors", tensors)
        write_json(
            work / "state.json",
            {
                "step": totals.step,
                "tokens": totals.tokens,
                "trained_tokens": totals.trained_tokens,
                "loader": loader.state.as_dict(),
            },
        )
    for old in checkpoints(run)[:-keep_last]:
        shutil.rmtree(old)


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first (half-written ones have another name)."""
    return sorted(p for p in (run / FOLDER).glob("step-*") if p.is_dir())


def load_newest(
    run: Path, optimizer: MasterOptimizer, loader: Loader
) -> tuple[Totals | None, list[str]]:
    """Restores the newest checkpoint that reads well.

    Returns:
        Its totals (None where there is none), and a message for each damaged one passed over.
    """
    skipped = []
    for folder in reversed(checkpoints(run)):
        try:
            tensors, _ = read_tensors(folder / "state.safetensors")
            state: dict[str, Any] = json.loads((folder / "state.json").read_text("utf-8"))
            totals = Totals(state["step"], state["tokens"], state["trained_tokens"])
            position = LoaderState(**state["loader"])
        except (CheckpointError, OSError, ValueError, KeyError, TypeError) as error:
            skipped.append(f"checkpoint {folder.name} is damaged and passed over ({error})")
            continue
        prefix = "optimizer."
        optimizer.load_tensors(
            {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        )
        loader.state = position
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"])
        return totals, skipped
    return None, skipped
