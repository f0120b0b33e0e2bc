"""Training objectives: `objective.loss(model, batch) -> LossOutput`.

Importing this package registers the built-in objectives.
"""

from easyllm.train.objectives.classifier import Classifier, ClassifierConfig
from easyllm.train.objectives.dpo import DPO, DPOConfig
from easyllm.train.objectives.language_model import LanguageModel, LanguageModelConfig
from easyllm.train.objectives.losses import LossOutput
from easyllm.train.objectives.objective import (
    OBJECTIVES,
    Objective,
    ObjectiveConfig,
    Reference,
    build_objective,
    objective_kind,
    register_objective,
    unregister_objective,
)
from easyllm.train.objectives.quantization_aware import QuantizationAware, QuantizationAwareConfig

__all__ = [
    "DPO",
    "OBJECTIVES",
    "Classifier",
    "ClassifierConfig",
    "DPOConfig",
    "LanguageModel",
    "LanguageModelConfig",
    "LossOutput",
    "Objective",
    "ObjectiveConfig",
    "QuantizationAware",
    "QuantizationAwareConfig",
    "Reference",
    "build_objective",
    "objective_kind",
    "register_objective",
    "unregister_objective",
]
