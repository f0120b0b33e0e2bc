"""Checks for values that are not finite, and JSON values without them."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from easyllm.core.json_types import Json


def all_finite(tensor: Tensor) -> bool:
    """Returns whether a floating-point tensor has no NaN and no infinite value."""
    if not tensor.numel():
        return True
    wide = (
        tensor.float() if tensor.dtype.itemsize == 1 else tensor
    )  # 8-bit floats cannot be compared
    return bool(torch.stack(wide.aminmax()).isfinite().all())


def finite_json(value: Json) -> Json:
    """Returns a JSON value with null for numbers that are not finite, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(each) for each in value]
    return value


__all__ = ["all_finite", "finite_json"]
