"""Training: one training loop for all objectives."""

from easyllm.train.config import TrainConfig
from easyllm.train.preflight import RunPlan
from easyllm.train.run import TrainResult, dry_run, train

__all__ = ["RunPlan", "TrainConfig", "TrainResult", "dry_run", "train"]
