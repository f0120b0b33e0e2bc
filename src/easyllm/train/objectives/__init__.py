"""What is minimised: `objective.loss(model, batch) -> LossOutput`."""

from easyllm.train.objectives.classifier import Classifier
from easyllm.train.objectives.language_model import LanguageModel, LossOutput, Objective

__all__ = ["Classifier", "LanguageModel", "LossOutput", "Objective"]
