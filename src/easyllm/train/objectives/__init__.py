"""What is minimised: `objective.loss(model, batch) -> LossOutput`."""

from easyllm.train.objectives.language_model import LanguageModel, LossOutput, Objective

__all__ = ["LanguageModel", "LossOutput", "Objective"]
