"""One loop, many objectives."""

from easyllm.train.config import TrainConfig
from easyllm.train.run import TrainResult, train

__all__ = ["TrainConfig", "TrainResult", "train"]
