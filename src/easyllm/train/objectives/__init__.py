"""Training objectives: `objective.loss(model, batch) -> LossOutput`.

Importing this package registers the built-in objectives.
"""

from easyllm.train.objectives.blank_infilling import BlankInfilling, BlankInfillingConfig
from easyllm.train.objectives.classifier import Classifier, ClassifierConfig
from easyllm.train.objectives.contrastive import Contrastive, ContrastiveConfig
from easyllm.train.objectives.distillation import Distillation, DistillationConfig
from easyllm.train.objectives.dpo import DPO, DPOConfig
from easyllm.train.objectives.kto import KTO, KTOConfig
from easyllm.train.objectives.language_model import LanguageModel, LanguageModelConfig
from easyllm.train.objectives.losses import LossOutput
from easyllm.train.objectives.objective import (
    OBJECTIVES,
    MemorySetup,
    Objective,
    ObjectiveConfig,
    Reference,
    RunSetup,
    Speed,
    StepSizes,
    build_objective,
    objective_kind,
    register_objective,
    unregister_objective,
)
from easyllm.train.objectives.orpo import ORPO, ORPOConfig
from easyllm.train.objectives.quantization_aware import QuantizationAware, QuantizationAwareConfig
from easyllm.train.objectives.reward import Reward, RewardConfig
from easyllm.train.objectives.router import routing_of, with_router_losses
from easyllm.train.objectives.simpo import SimPO, SimPOConfig
from easyllm.train.objectives.span_corruption import SpanCorruption, SpanCorruptionConfig

__all__ = [
    "DPO",
    "KTO",
    "OBJECTIVES",
    "ORPO",
    "BlankInfilling",
    "BlankInfillingConfig",
    "Classifier",
    "ClassifierConfig",
    "Contrastive",
    "ContrastiveConfig",
    "DPOConfig",
    "Distillation",
    "DistillationConfig",
    "KTOConfig",
    "LanguageModel",
    "LanguageModelConfig",
    "LossOutput",
    "MemorySetup",
    "ORPOConfig",
    "Objective",
    "ObjectiveConfig",
    "QuantizationAware",
    "QuantizationAwareConfig",
    "Reference",
    "Reward",
    "RewardConfig",
    "RunSetup",
    "SimPO",
    "SimPOConfig",
    "SpanCorruption",
    "SpanCorruptionConfig",
    "Speed",
    "StepSizes",
    "build_objective",
    "objective_kind",
    "register_objective",
    "routing_of",
    "unregister_objective",
    "with_router_losses",
]
