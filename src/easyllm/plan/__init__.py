"""Estimates the parameters, memory, FLOPs and time of a model from its configuration alone."""

from easyllm.plan.parameters import ParameterCount, count_parameters
from easyllm.plan.report import ModelPlan, plan_model

__all__ = ["ModelPlan", "ParameterCount", "count_parameters", "plan_model"]
