"""A check for values that are not finite."""

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Returns whether a floating-point tensor has no NaN and no infinite value."""
    if not tensor.numel():
        return True
    # 8-bit floats cannot be compared
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return bool(torch.stack(wide.aminmax()).isfinite().all())


__all__ = ["all_finite"]
