"""What a model costs, from its configuration alone."""

from easyllm.plan.parameters import ParameterCount, count_parameters
from easyllm.plan.report import ModelPlan, plan_model

__all__ = ["ModelPlan", "ParameterCount", "count_parameters", "plan_model"]
