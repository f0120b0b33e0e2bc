"""Estimates the parameters, memory, FLOPs and time of a model from its configuration alone.

Exports are imported lazily: the engine uses one module of the package, and needs no others.
"""

from typing import TYPE_CHECKING

from easyllm.core.lazy import lazy_exports

if TYPE_CHECKING:
    from easyllm.plan.parameters import ParameterCount, count_parameters
    from easyllm.plan.report import ModelPlan, plan_model

__all__ = ["ModelPlan", "ParameterCount", "count_parameters", "plan_model"]

__getattr__ = lazy_exports(
    __name__,
    {
        "ModelPlan": "easyllm.plan.report",
        "ParameterCount": "easyllm.plan.parameters",
        "count_parameters": "easyllm.plan.parameters",
        "plan_model": "easyllm.plan.report",
    },
)
