"""The model of a run's checkpoints, to use it while the run continues."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from easyllm.adapters import AdapterSet
from easyllm.checkpoint.stream import Under
from easyllm.core.config import validate
from easyllm.core.device import pick_device
from easyllm.core.errors import CheckpointError, ConfigError
from easyllm.core.run_folder import RECIPE_FILE
from easyllm.core.yaml_text import parse_yaml
from easyllm.nn.decoder import Decoder
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.train.config import TrainConfig
from easyllm.train.factories import build_model, find_base_model
from easyllm.train.metrics import read_metrics
from easyllm.train.objectives import build_objective, objective_kind
from easyllm.train.sharded_state import open_tensors
from easyllm.train.state import checkpoints


@dataclass(slots=True)
class CheckpointModel:
    """A run's model, with the weights of one of its checkpoints.

    Attributes:
        run: the run's folder.
        model: the model; before the first checkpoint, as the run began.
        tokenizer: its tokenizer.
        adapters: the adapter that is trained; None if all weights are.
        step: step of the checkpoint; 0 before the first.

    Example:
        watched = CheckpointModel.open(Path("runs/mine"))
        if found := watched.newer():
            watched.load(*found)
    """

    run: Path
    model: Decoder
    tokenizer: Tokenizer
    adapters: AdapterSet | None
    step: int = 0

    @classmethod
    def open(cls, run: Path) -> Self:
        """Builds the model of a run.

        Raises:
            ConfigError: the folder contains no run, or one whose model generates no text.
            SourceError, CheckpointError: the model that it began with is missing or damaged.
        """
        recipe = run / RECIPE_FILE
        if not recipe.is_file():
            raise ConfigError(
                f"{str(run)!r} is not the folder of a training run: it has no {RECIPE_FILE}; give "
                "the folder that the run's `output` names"
            )
        values = parse_yaml(recipe.read_text("utf-8"))
        if not isinstance(values, dict):
            raise ConfigError(f"{str(recipe)!r} is not a recipe")
        config = validate(TrainConfig, values, source=str(recipe))
        if not objective_kind(config.objective).generates:
            raise ConfigError(f"the run in {str(run)!r} trains a model that generates no text")
        origin, objective = find_base_model(config), build_objective(config.objective)
        trained = build_model(config, origin, objective, pick_device(config.device))
        model = trained.model.requires_grad_(False).eval()
        return cls(run=run, model=model, tokenizer=origin.tokenizer, adapters=trained.adapters)

    def newer(self) -> tuple[int, Mapping[str, Tensor]] | None:
        """Returns step and weights of the newest checkpoint; None if it is not a newer one.

        The weights are read into memory: the run may remove the checkpoint at any time, which
        counts as none.
        """
        for folder in reversed(checkpoints(self.run)):
            step = int(folder.name.removeprefix("step-"))
            if step <= self.step:
                return None
            try:
                tensors = open_tensors(folder)
                wanted = Under(tensors, "optimizer.master."), Under(tensors, "adapter.")
                return step, {
                    f"{prefix}.{name}": tensor.clone()
                    for prefix, part in zip(("weights", "adapter"), wanted, strict=True)
                    for name, tensor in part.items()
                }
            except (CheckpointError, OSError):
                continue
        return None

    @torch.no_grad()
    def load(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Writes what `newer` returned into the model, in place."""
        parameters = dict(self.model.named_parameters())
        for name, value in Under(weights, "weights.").items():
            parameters[name].copy_(value)
        if self.adapters is not None:
            self.adapters.load_state(dict(Under(weights, "adapter.")))
        self.step = step

    def scores(self) -> dict[str, float]:
        """Returns the latest value of each evaluation metric up to the checkpoint's step."""
        found: dict[str, float] = {}
        for line in read_metrics(self.run):
            if line.get("step", 0) <= self.step:
                found |= {
                    name: float(value)
                    for name, value in line.items()
                    if name.startswith(("eval/", "train/loss")) and isinstance(value, int | float)
                }
        return dict(sorted(found.items()))
