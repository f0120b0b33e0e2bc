"""Training: one training loop for all objectives."""

from easyllm.train.config import TrainConfig
from easyllm.train.preflight import RunPlan
from easyllm.train.run import TrainResult, dry_run, train
from easyllm.train.training_run import Callback, Run, StepReport

__all__ = [
    "Callback",
    "Run",
    "RunPlan",
    "StepReport",
    "TrainConfig",
    "TrainResult",
    "dry_run",
    "train",
]
