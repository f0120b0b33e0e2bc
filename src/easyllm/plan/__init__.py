"""What a model costs, from its configuration alone."""

from easyllm.plan.parameters import ParameterCount, count_parameters

__all__ = ["ParameterCount", "count_parameters"]
